"""``fusesnap doctor``: looks at a machine, a state directory, the caches and containerd, and changes none of them."""
