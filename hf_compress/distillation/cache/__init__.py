"""A teacher asked once: its answers travel as a column of the dataset."""
