"""The keeping of a run: its folder, one run at a time in it, what is done there, and how it goes on."""
