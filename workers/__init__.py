"""What they do: one subpackage a worker process, and what all workers share."""
