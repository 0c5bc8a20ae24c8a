"""Registries: an image is pushed into one.

What is in here: names of images in registries (``reference``), the passwords that Docker keeps (``credentials``), the
tokens that a registry wants (``authentication``), one request after another (``client``), and the whole of an image
(``push``). What is not: pulling, which is containerd's; the environment, and where configuration files are.

Sources: OCI distribution specification 1.1 (https://github.com/opencontainers/distribution-spec, ``spec.md``) and
"Token Authentication Specification" of distribution (https://distribution.github.io/distribution/spec/auth/token/).
"""
