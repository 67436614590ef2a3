"""The library under the commands of `jobs`: from a list of images to committed Parquet parts."""
