# What a build of Palyra needs, in one place. Sourced by cluster/up, tests/run and .ci/run; never run by itself.
#
# After it: cargo works, libclang is there (RocksDB's bindings are generated at build time), and CARGO_TARGET_DIR names one
# folder outside of the checkout, so that every clone on this machine shares one compiled RocksDB.

say() { printf '%s\n' "$*" >&2; }

need_packages() {
    local missing=()
    command -v g++ >/dev/null || missing+=(g++)
    command -v make >/dev/null || missing+=(make)
    command -v git >/dev/null || missing+=(git)
    command -v curl >/dev/null || command -v cargo >/dev/null || missing+=(curl ca-certificates)
    ls /usr/lib/llvm-*/lib/libclang.so* /usr/lib/*/libclang*.so* >/dev/null 2>&1 \
        || [ -n "${LIBCLANG_PATH:-}" ] || missing+=(libclang-dev)
    # The benchmarks speak with etcd by a library that compiles etcd's own protocol files.
    command -v protoc >/dev/null || missing+=(protobuf-compiler)
    # Not needed, but it turns the second compilation of RocksDB (twenty minutes) into seconds.
    command -v ccache >/dev/null || missing+=(ccache)
    [ ${#missing[@]} -eq 0 ] || install_packages "${missing[@]}"
}

install_packages() { # install_packages NAME...: Debian's names
    local missing=("$@") sudo=()
    [ "$(id -u)" = 0 ] || sudo=(sudo)
    if command -v apt-get >/dev/null; then
        say "installing: ${missing[*]}"
        { "${sudo[@]}" apt-get update -q && DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -q "${missing[@]}"; } \
            >/tmp/palyra-apt.$$ 2>&1 || { cat /tmp/palyra-apt.$$ >&2; say "error: apt-get failed"; return 1; }
        rm -f /tmp/palyra-apt.$$
        return 0
    fi
    say "This is not a Debian-like system. These are needed (Debian's names): ${missing[*]}"
    local tool=""
    for candidate in dnf pacman zypper apk brew; do
        command -v "$candidate" >/dev/null && { tool=$candidate; break; }
    done
    if [ -z "$tool" ] || [ ! -t 0 ]; then
        say "error: install them, then run this again (LIBCLANG_PATH names an unusual place of libclang)"
        return 1
    fi
    local names
    case $tool in
        dnf) names="gcc-c++ make git clang-devel protobuf-compiler ccache"; set -- "${sudo[@]}" dnf install -y ;;
        pacman) names="gcc make git clang protobuf ccache"; set -- "${sudo[@]}" pacman -S --needed --noconfirm ;;
        zypper) names="gcc-c++ make git clang-devel protobuf-devel ccache"; set -- "${sudo[@]}" zypper install -y ;;
        apk) names="g++ make git clang-dev protoc ccache"; set -- "${sudo[@]}" apk add ;;
        brew) names="llvm protobuf ccache"; set -- brew install ;;
    esac
    case " ${missing[*]} " in *" valgrind "*) names+=" valgrind" ;; esac
    printf 'Run "%s %s" now? [y/N] ' "$*" "$names" >&2
    read -r answer
    case $answer in
        y | Y | yes) "$@" $names ;;
        *) say "error: stopped; nothing was installed"; return 1 ;;
    esac
}

need_rust() {
    [ -f "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"
    if ! command -v cargo >/dev/null; then
        say "error: Rust is not installed. Install rustup (your distribution's package 'rustup', or the way that"
        say "       rust-lang.org shows), then run this again: rust-toolchain.toml picks the version."
        return 1
    fi
}

# What counts instructions: valgrind, and the runner of the library that the benchmarks use, in the same version. Only
# who runs those benchmarks calls this; a build needs neither.
need_counting() {
    local tools version
    command -v valgrind >/dev/null || install_packages valgrind || return 1
    tools=${XDG_CACHE_HOME:-$HOME/.cache}/palyra/tools
    version=$(awk '/^name = "gungraun-runner"$/ { getline; gsub(/"/, "", $3); print $3 }' Cargo.lock)
    export PATH="$tools/bin:$PATH"
    [ "$("$tools/bin/gungraun-runner" --version 2>/dev/null)" = "gungraun-runner $version" ] && return 0
    say "installing: gungraun-runner $version"
    CARGO_TARGET_DIR="$tools/build" cargo install gungraun-runner --version "=$version" --locked --debug --force --quiet \
        --root "$tools" >&2 || { say "error: gungraun-runner cannot be installed"; return 1; }
    rm -rf "$tools/build"
}

need_packages && need_rust || exit 1
[ -d /usr/lib/ccache ] && export PATH="/usr/lib/ccache:$PATH"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/palyra/target}"
export CARGO_TERM_PROGRESS_WHEN="${CARGO_TERM_PROGRESS_WHEN:-never}"
