"""What the errors of encoded segments do to the attention output, and the headers that say so."""
