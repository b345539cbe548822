"""What hands out nodes: Slurm and Ray, asked through their own interfaces."""
