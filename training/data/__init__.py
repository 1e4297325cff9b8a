"""Data: tar shards with a parquet index, the plan of batches, decoding, and the commands that prepare them."""
