"""A virtual machine monitor in Python, and its command vmm."""
