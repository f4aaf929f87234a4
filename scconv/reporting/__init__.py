"""What several pages share: figures in one style, tables of runs, recorded numbers, and sample images."""
