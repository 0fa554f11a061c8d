"""A checkpoint that answers: what the command line and the demo stand on."""
