#!/usr/bin/env bash
# Builds and tests for machines other than this one, from Debian on x86-64.
#
# rustup's compiler comes with the standard library of its own machine only. Debian 12 ships a
# second, current compiler, `rustc-web`, with an arm64 standard library beside it and the sources
# of the standard library, from which cargo builds the others. Its packages would replace an
# installed rustc, so they are unpacked into target/cross and nothing is installed from them;
# the C cross compiler and qemu conflict with nothing and are installed.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: scripts/cross-check.sh TARGET... [-p CRATE]... [--cpu MODEL] [-- TEST_ARGUMENT...]
       scripts/cross-check.sh aarch64-linux --run [--cpu MODEL] -- BITNET_ARGUMENT...

targets
  aarch64-linux  build, and run the tests of the crates under qemu-aarch64
                 (default crates: bitnet-core bitnet-quant bitnet-cpu)
  macos          type-check the whole workspace for aarch64-apple-darwin
  windows        type-check the whole workspace for x86_64-pc-windows-msvc

options, of aarch64-linux only
  -p CRATE       test this crate in place of the default ones; may be given again
  --cpu MODEL    processor that qemu plays: max (default) has every extension qemu knows,
                 neoverse-n1 lacks the matrix-multiplication instructions (i8mm),
                 cortex-a72 has NEON without the dot-product instructions too
  --run          run the bitnet program with the arguments after --, its output alone on stdout
  -- ARGUMENT... passed to the test programs, such as the name of a test

Exit status: 0 all passed, 2 wrong usage, 77 this machine cannot do it (the reason follows
"skipped:"), otherwise that of the cargo command, or of bitnet, that failed.
USAGE
}

say() { echo "cross-check: $*" >&2; }

wrong_usage() {
    say "$*"
    usage >&2
    exit 2
}

cannot() {
    echo "skipped: $*" >&2
    exit 77
}

cd "$(dirname "$0")/.."
cross=$PWD/target/cross
toolchain=$cross/toolchain

# Unpacks the compiler, its arm64 standard library and the library sources once.
prepare_toolchain() {
    if [[ -e $toolchain ]]; then
        return
    fi
    command -v apt-get >/dev/null || cannot "apt-get is not here; this script needs Debian's packages"
    local host
    host=$(dpkg --print-architecture)
    [[ $host == amd64 ]] || cannot "the host is $host; this script knows how to start from amd64"

    local lists=$cross/apt/lists debs=$cross/apt/debs unpacked=$cross/unpacking
    rm -rf "$debs" "$unpacked"
    mkdir -p "$lists/partial" "$debs" "$unpacked"
    # Package lists of our own: they hold arm64 without `dpkg --add-architecture`, and reading
    # them takes no root.
    local apt=(
        -q
        -o "APT::Architectures::=amd64"
        -o "APT::Architectures::=arm64"
        -o "APT::Sandbox::User=root"
        -o "Dir::State::Lists=$lists"
        -o "Dir::Cache=$cross/apt"
    )
    say "reading package lists"
    apt-get "${apt[@]}" update >"$cross/apt/log" 2>&1 ||
        cannot "apt-get update failed: $(tail -n 1 "$cross/apt/log")"

    # The library packages carry their version in their name, so ask the compiler for them.
    local libraries
    libraries=$(apt-cache "${apt[@]}" depends --recurse --important rustc-web 2>/dev/null |
        grep -E '^(libllvm|libstd-rust-web-)[0-9.]+$' | sort -u) ||
        cannot "apt offers no package rustc-web (Debian 12 has it); apt-get update ended with:" \
            "$(tail -n 1 "$cross/apt/log")"
    local packages=(rustc-web libstd-rust-web-dev:amd64 libstd-rust-web-dev:arm64 rust-web-src)
    mapfile -t -O "${#packages[@]}" packages <<<"$libraries"
    say "fetching ${packages[*]}"
    (cd "$debs" && apt-get "${apt[@]}" download "${packages[@]}") >"$cross/apt/log" 2>&1 ||
        cannot "apt-get download failed: $(tail -n 1 "$cross/apt/log")"

    local deb
    for deb in "$debs"/*.deb; do
        case ${deb##*/} in
            # The sources hold the compiler too; cargo needs the library.
            rust-web-src_*)
                dpkg --fsys-tarfile "$deb" | tar -x -C "$unpacked" --wildcards \
                    './usr/lib/*' './usr/src/*/library'
                ;;
            *) dpkg -x "$deb" "$unpacked" ;;
        esac
    done

    # The loader finds the compiler's libraries through these two, so that LD_LIBRARY_PATH
    # reaches no other program.
    local program
    for program in rustc rustdoc; do
        cat >"$unpacked/$program" <<'WRAPPER'
#!/bin/sh
here=$(dirname "$0")/usr
LD_LIBRARY_PATH=$here/lib/x86_64-linux-gnu${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH
exec "$here/bin/${0##*/}" "$@"
WRAPPER
        chmod +x "$unpacked/$program"
    done
    "$unpacked/rustc" --version >"$cross/apt/log" 2>&1 ||
        cannot "the unpacked compiler does not start: $(tail -n 1 "$cross/apt/log")"
    mv "$unpacked" "$toolchain"
    rm -rf "$debs"
}

# Installs the programs that turn and run arm64 code, where they are missing.
prepare_aarch64_linux() {
    if command -v aarch64-linux-gnu-gcc >/dev/null && command -v qemu-aarch64 >/dev/null &&
        [[ -e /usr/aarch64-linux-gnu/lib/crt1.o ]]; then
        return
    fi
    command -v apt-get >/dev/null || cannot "aarch64-linux-gnu-gcc or qemu-aarch64 is missing, and apt-get too"
    local root=()
    if [[ $EUID -ne 0 ]]; then
        command -v sudo >/dev/null ||
            cannot "gcc-aarch64-linux-gnu and qemu-user are not installed, and installing them takes root or sudo"
        root=(sudo -n)
    fi
    mkdir -p "$cross/apt"
    say "installing gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"
    {
        "${root[@]}" apt-get -q update &&
            "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y \
                install --no-install-recommends gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
    } >"$cross/apt/log" 2>&1 </dev/null ||
        cannot "apt-get install failed: $(tail -n 1 "$cross/apt/log")"
}

# cross_cargo FOLDER ARGUMENT...: cargo with the unpacked compiler and a build folder that leaves
# the usual one alone. A caller's flags are for the host's processor and stay out.
cross_cargo() {
    env -u RUSTFLAGS -u CARGO_ENCODED_RUSTFLAGS -u RUSTDOCFLAGS \
        RUSTC="$toolchain/rustc" \
        RUSTDOC="$toolchain/rustdoc" \
        CARGO_TARGET_DIR="$cross/$1" \
        CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
        CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="${emulator[*]}" \
        cargo "${@:2}"
}

# fetch FOLDER TARGET ARGUMENT...: a machine that cannot reach the dependencies of another target
# is not a failure of the code.
fetch() {
    local log=$cross/fetch.log
    cross_cargo "$1" fetch -q --locked --target "$2" "${@:3}" 2>"$log" ||
        cannot "cargo cannot fetch the dependencies for $2: $(head -n 1 "$log")"
}

# Writes a program that makes the file it is asked for, empty, in place of a C compiler and of the program
# that joins its results: types are checked without what C would compile to.
prepare_stand_in() {
    stand_in=$cross/no-c
    cat >"$stand_in" <<'STAND_IN'
#!/bin/sh
# The file follows -o, or stands in -FoFILE or -out:FILE, or behind ar's letters.
for argument; do
    case $argument in
        -Fo*) : >"${argument#-Fo}" ;;
        -out:*) : >"${argument#-out:}" ;;
        *.a) : >"$argument" ;;
        *) [ "$previous" != -o ] || : >"$argument" ;;
    esac
    previous=$argument
done
STAND_IN
    chmod +x "$stand_in"
}

# There is no prebuilt standard library for these: cargo builds it from the unpacked sources,
# which takes the compiler's unstable options. Nothing is linked, so no C compiler for the target
# and no SDK are needed. The folder is another one than build because RUSTC_BOOTSTRAP makes build
# scripts run again.
type_check() {
    local -x RUSTC_BOOTSTRAP=1
    prepare_stand_in
    local -x "CC_${1//-/_}=$stand_in" "AR_${1//-/_}=$stand_in"
    fetch check "$1" -Zbuild-std=std,panic_abort
    cross_cargo check check --locked --workspace --target "$1" -Zbuild-std=std,panic_abort
}

targets=()
crates=()
arguments=()
cpu=max
run=
while (($#)); do
    case $1 in
        aarch64-linux | macos | windows) targets+=("$1") ;;
        -p | --cpu)
            (($# > 1)) || wrong_usage "$1 needs a value"
            if [[ $1 == -p ]]; then crates+=(-p "$2"); else cpu=$2; fi
            shift
            ;;
        --run) run=yes ;;
        --)
            shift
            arguments=("$@")
            break
            ;;
        -h | --help)
            usage
            exit
            ;;
        *) wrong_usage "unknown target or option '$1'" ;;
    esac
    shift
done
((${#targets[@]})) || wrong_usage "which target?"
if [[ -n $run && ${targets[*]} != aarch64-linux ]]; then
    wrong_usage "--run goes with the one target aarch64-linux"
fi
((${#crates[@]})) || crates=(-p bitnet-core -p bitnet-quant -p bitnet-cpu)
emulator=(qemu-aarch64 -cpu "$cpu" -L /usr/aarch64-linux-gnu)

command -v cargo >/dev/null || cannot "cargo is not on the PATH"
prepare_toolchain
for target in "${targets[@]}"; do
    SECONDS=0
    case $target in
        aarch64-linux)
            prepare_aarch64_linux
            fetch build aarch64-unknown-linux-gnu
            if [[ -n $run ]]; then
                cross_cargo build build --locked -p bitnet-cli --target aarch64-unknown-linux-gnu >&2
                exec "${emulator[@]}" "$cross/build/aarch64-unknown-linux-gnu/debug/bitnet" \
                    "${arguments[@]}"
            fi
            cross_cargo build test --locked "${crates[@]}" --target aarch64-unknown-linux-gnu \
                -- "${arguments[@]}"
            ;;
        macos) type_check aarch64-apple-darwin ;;
        windows) type_check x86_64-pc-windows-msvc ;;
    esac
    say "$target passed in $SECONDS s"
done
