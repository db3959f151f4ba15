"""Floor 3: executes decisions. The life of a page, which page is encoded next, and the audit of all of it."""
