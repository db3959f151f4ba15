"""The far field of steps that go on with an earlier selection keeps its share of the attention."""
