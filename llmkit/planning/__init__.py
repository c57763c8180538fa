"""What a run will need, said before it starts: memory, time, disk and cost. Nothing is trained or downloaded here."""
