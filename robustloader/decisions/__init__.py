"""What to do next, decided purely: no process, no torch, no clock. Time comes in as an argument."""
