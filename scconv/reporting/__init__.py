"""What several pages share: figures in one style, tables of runs, and the numbers that notebooks record."""
