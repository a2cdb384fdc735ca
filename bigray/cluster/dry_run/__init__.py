"""A cluster of several real Ray nodes on one machine, to try what a cluster does: its file, processes and record."""
