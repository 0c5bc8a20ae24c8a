#!/bin/sh
# Installs fusesnap on this machine, or brings it up to date: the program, its systemd unit, its configuration, and
# containerd's. Whatever is as it should be is left alone, so that it can run any number of times; containerd and the
# kubelet are restarted only when their configuration changed. Containers do not notice.
#
#   install.sh DIRECTORY      a directory with fusesnap.toml and fusesnap.service
#
# FUSESNAP_PACKAGE   what pip installs: a file or a URL of a release
# DESTDIR            where the machine's root is; empty
set -eu

files=$1
root=${DESTDIR:-}
package=${FUSESNAP_PACKAGE:?says what pip is to install, as https://example.org/fusesnap-0.1.0.tar.gz}
program=$root/usr/local/bin/fusesnap
environment=$root/opt/fusesnap

say() { echo "fusesnap: $*"; }

# Puts a file in its place; succeeds only if it was not there, or another.
changed() {
    if [ -e "$2" ] && cmp -s "$1" "$2"; then return 1; fi
    mkdir -p "$(dirname "$2")"
    cp "$1" "$2.new"
    mv "$2.new" "$2"
    say "wrote $2"
}

if ! python3 -c 'import ensurepip' 2>/dev/null && command -v apt-get >/dev/null; then
    apt-get update -q
    apt-get install -qy python3-venv python3-dev gcc pkg-config libfuse3-dev fuse3
fi
modprobe fuse 2>/dev/null || true

# A new environment beside the old one, which may be in use.
restart=no
if [ "$(cat "$environment/package" 2>/dev/null || true)" != "$package" ]; then
    say "installing $package"
    rm -rf "$environment.new"
    python3 -m venv "$environment.new"
    "$environment.new/bin/pip" install -q "$package"
    echo "$package" >"$environment.new/package"
    rm -rf "$environment.old"
    if [ -e "$environment" ]; then mv "$environment" "$environment.old"; fi
    mv "$environment.new" "$environment"
    # Its scripts name the directory that they were made in.
    sed -i "1s|$environment.new|$environment|" "$environment"/bin/*
    restart=yes
fi
mkdir -p "$(dirname "$program")"
ln -sfn /opt/fusesnap/bin/fusesnap "$program"

if changed "$files/fusesnap.toml" "$root/etc/fusesnap.toml"; then restart=yes; fi
if changed "$files/fusesnap.service" "$root/etc/systemd/system/fusesnap.service"; then
    systemctl daemon-reload
    restart=yes
fi
systemctl enable --now fusesnap
# Readers of what is missing do not notice a reload.
if [ "$restart" = yes ]; then systemctl reload-or-restart fusesnap; fi

# containerd reads the file that its own one imports.
main=$root/etc/containerd/config.toml
version=$(sed -n 's/^version *= *\([0-9]*\).*/\1/p' "$main" 2>/dev/null | head -n 1)
temporary=$(mktemp)
trap 'rm -f "$temporary"' EXIT
"$environment/bin/fusesnap" daemon --print-containerd-config "${version:-3}" >"$temporary"
if changed "$temporary" "$root/etc/containerd/conf.d/fusesnap.toml"; then
    if [ ! -e "$main" ]; then
        printf 'version = %s\nimports = ["/etc/containerd/conf.d/*.toml"]\n' "${version:-3}" >"$main"
    elif ! grep -q '^imports *=.*/etc/containerd/conf.d/\*.toml' "$main"; then
        say "$main must have: imports = [\"/etc/containerd/conf.d/*.toml\"]" >&2
        exit 1
    fi
    systemctl restart containerd
fi

# The kubelet asks us for images. Merged over its --config since Kubernetes 1.30, with --config-dir.
printf '%s\n' 'apiVersion: kubelet.config.k8s.io/v1beta1' 'kind: KubeletConfiguration' \
    'imageServiceEndpoint: unix:///var/lib/fusesnap/fusesnap.sock' >"$temporary"
if changed "$temporary" "$root/etc/kubernetes/kubelet.conf.d/50-fusesnap.conf"; then
    systemctl try-restart kubelet
fi
"$environment/bin/fusesnap" doctor || say "fusesnap doctor has more to say: see above"
say "done"
