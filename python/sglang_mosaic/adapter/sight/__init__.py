"""What people see of a running server: ``/mosaic``, a page, and ``/mosaic/stats``, its figures."""
