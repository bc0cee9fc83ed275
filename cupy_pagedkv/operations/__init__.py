"""What can be done with pools, whatever the device: the checks of the arguments, then a backend. Stands on
``devices``."""
