#!/usr/bin/env bash
# Builds the release archive for this platform, unpacks it elsewhere and runs the README's first command.
#
#   scripts/make-release.sh [FOLDER]
#
# Writes bitnet-VERSION-TARGET.tar.gz and its .sha256 to FOLDER (target/archives). In the archive are the
# program, its licences, README and changelog, completions for five shells, and the manual pages.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-target/archives}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

cargo build --release --locked -p bitnet-cli
program=target/release/bitnet
[[ -e $program ]] || program=$program.exe

version=$("$program" --version)
version=${version#bitnet }
target=$(rustc -vV | sed -n 's/^host: //p')
name=bitnet-$version-$target

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
stage=$work/$name
mkdir -p "$stage/completions"
cp "$program" LICENSE-MIT LICENSE-APACHE README.md CHANGELOG.md "$stage"
for shell in bash zsh fish elvish powershell; do
    "$program" completions "$shell" >"$stage/completions/bitnet.$shell"
done
"$program" --quiet man "$stage/man/man1"

archive=$name.tar.gz
tar -C "$work" -czf "$folder/$archive" "$name"
sha256=$(command -v sha256sum || echo "shasum -a 256")
(cd "$folder" && $sha256 "$archive" >"$archive.sha256")

# What is delivered is what was checked.
mkdir "$work/unpacked"
(cd "$folder" && $sha256 --check "$archive.sha256" >/dev/null)
tar -C "$work/unpacked" -xzf "$folder/$archive"
cd "$work/unpacked/$name"
prompt="Once upon a time"
# Nothing of the user's own: no folder of settings, no variables.
text=$(env -i HOME="$work" "./$(basename "$program")" run "$prompt" 2>/dev/null)
if [[ ${text#"$prompt"} != *[[:alpha:]]* ]]; then
    echo "the unpacked program printed no text of its own" >&2
    exit 1
fi
printf '%s\n' "$text"
bytes() { wc -c <"$1" | tr -d ' '; }
printf '%s: %d bytes, the program %d bytes\n' \
    "$folder/$archive" "$(bytes "$folder/$archive")" "$(bytes "$(basename "$program")")"
