"""A decode step's plan, made on the device from the page table."""
