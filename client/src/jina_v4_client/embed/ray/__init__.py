"""`jina-v4-embed --ray`: the corpus as a pipeline of Ray Data, in which no row passes the driver.

`corpus` lists files and has them read, `worker` embeds, `parts` writes parquet parts, `run` puts them together. The
rest is Ray Data's: it shares out the work, holds readers back, replaces lost workers, and keeps checkpoints.
"""
