#!/bin/sh
# Installs the shared library of a build, its header and its pkg-config file; `make install` runs it.
#
#   scripts/install.sh BUILD DESTDIR PREFIX
set -eu

[ $# -eq 3 ] || { echo "usage: ${0##*/} BUILD DESTDIR PREFIX" >&2; exit 2; }
build=$1
to=$2$3
prefix=$3
version=$(cat VERSION)

install -d "$to/include" "$to/lib/pkgconfig"
install -m 644 layers/blocks.h "$to/include/blocks.h"
install -m 755 "$build/libblocks.so.0" "$to/lib/libblocks.so.$version"
ln -sf "libblocks.so.$version" "$to/lib/libblocks.so.0"
ln -sf libblocks.so.0 "$to/lib/libblocks.so"
cat >"$to/lib/pkgconfig/blocks.pc" <<END
prefix=$prefix
includedir=\${prefix}/include
libdir=\${prefix}/lib

Name: blocks
Description: Attention and linear recurrences, operations and layers
Version: $version
Cflags: -I\${includedir}
Libs: -L\${libdir} -lblocks
END
