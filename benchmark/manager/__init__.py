"""What the manager costs and gains."""
