"""What devices talk to: files, terminals, streams. Here is the I/O that devices do not do."""
