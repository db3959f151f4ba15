"""Where records live: host memory, then a directory that several managers of one machine share."""
