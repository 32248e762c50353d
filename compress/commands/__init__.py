"""One file a verb: read arguments, call, print. Nothing here decides anything, and heavy imports wait for the call."""
