"""Guest-physical memory for virtual machine monitors: regions, access, dirty tracking."""
