"""What lets a run survive its cluster: signals, stop requests, heartbeats."""
