"""Where the work is done: the one choice of device, and a backend for each, with the same functions. Stands on
``bookkeeping``, of which it takes no more than the names of dtypes."""
