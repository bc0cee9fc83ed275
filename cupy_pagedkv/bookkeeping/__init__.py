"""Which block is whose: the allocator, block tables, and blocks that are shared and found again. Host only; knows no
device and no K or V. The lowest floor."""
