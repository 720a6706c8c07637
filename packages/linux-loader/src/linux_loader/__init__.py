"""Load kernels, initrds, boot parameters and command lines into guest memory."""
