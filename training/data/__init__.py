"""Data: tar shards with a parquet index beside them, the plan of batches, decoding, and the commands that prepare
them."""
