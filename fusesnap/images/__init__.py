"""Container images without a registry: layouts and archives, their layers, and the tree they make.

What is in here: references to store paths (``reference``) and to OCI layouts on disk (``source``),
their documents (``documents``, ``layout``) and blobs (``blobs``, ``digest``), layers as
uncompressed tars in a cache (``layer_cache``) and as entries (``layer``), what a layer says about
Nix (``nix_layer``), the merged tree (``merge``, ``rootfs``), and images in store paths
(``store_images``, ``opening``) or made of packages (``synthesis``, ``programs``). What is not:
mounts, registries, containerd.

Everything but ``store_images``, ``resolving`` and ``programs``, which fetch, is synchronous, called from threads
where it is long. It needs no privileges: nothing is extracted, so an ordinary user sees owners,
devices and modes as the image has them.

Sources of the formats: OCI image specification 1.1 (https://github.com/opencontainers/image-spec:
``image-layout.md``, ``image-index.md``, ``manifest.md``, ``config.md``, ``layer.md``) and Docker's
image manifest version 2, schema 2.
"""
