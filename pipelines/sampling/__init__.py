"""What `sample` and `predict` do: clips and videos are continued, and written as pictures."""
