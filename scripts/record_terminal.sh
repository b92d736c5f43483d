#!/usr/bin/env bash
# Records what `bitnet chat` and `bitnet batch` look like in a terminal of 80 columns and 24 lines, with
# the built-in model, and prints it as text. docs/commands.md shows such a recording.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: scripts/record_terminal.sh [BITNET]

BITNET is the program, target/release/bitnet unless it is said.

Exit status: 0 recorded, 1 the program did not do what was expected, 77 tmux is not here.
USAGE
}

case ${1:-} in
-*)
    usage
    exit 2
    ;;
esac
bitnet=$(realpath "${1:-$(dirname "$0")/../target/release/bitnet}")
if ! command -v tmux >/dev/null; then
    echo "skipped: tmux is not here" >&2
    exit 77
fi

folder=$(mktemp -d)
# A server of its own: other sessions of this user are none of our business.
terminal() { tmux -L "bitnet-$$" "$@"; }
trap 'terminal kill-server 2>/dev/null || true; rm -rf "$folder"' EXIT

screen() { terminal capture-pane -p -S - -t record; }

# wait_for TEXT: until the screen shows it, for a minute at most.
wait_for() {
    local tries
    for ((tries = 0; tries < 600; tries++)); do
        if screen | grep -qF -- "$1"; then
            return
        fi
        sleep 0.1
    done
    echo "the screen never showed: $1" >&2
    screen >&2
    exit 1
}

type_line() {
    terminal send-keys -t record -l "$1"
    terminal send-keys -t record Enter
}

begin() {
    terminal -f /dev/null new-session -d -s record -x 80 -y 24 \
        "cd '$folder' && exec env -i TERM=xterm HOME='$folder' PATH='$folder:$PATH' PS1='\$ ' sh"
    terminal set-option -g history-limit 2000 >/dev/null
    wait_for '$'
}

end() {
    screen | sed -e :a -e '/^\n*$/{$d;N;ba' -e '}'
    terminal kill-session -t record
}

ln -s "$bitnet" "$folder/bitnet"

echo "== chat"
begin
type_line 'bitnet chat --system "You tell stories." -n 60 --seed 7'
wait_for 'Ctrl-D leaves'
type_line 'Tell me a story about a cat and a dog.'
wait_for '/512] '
type_line '/set temperature 0.3'
type_line 'Tell me of a girl who finds a little red ball.'
sleep 2
type_line '/stats'
wait_for 'last prompt'
type_line '/save story.json'
wait_for 'story.json: written'
type_line '/sing'
wait_for 'no command'
terminal send-keys -t record C-d
sleep 0.5
end

echo
echo "== batch"
{
    echo 'id,name,thing'
    for ((row = 1; row <= 300; row++)); do
        echo "$row,Lily,ball"
    done
    echo '301,Tom'
} >"$folder/stories.csv"
batch="bitnet batch stories.csv -o stories.jsonl -n 40 --temperature 0.7"
batch+=" --template '{{ name }} had a {{ thing }}.'"
begin
type_line 'head -3 stories.csv'
wait_for '2,Lily'
sleep 0.3
type_line "$batch"
wait_for ' left'
sleep 2
terminal send-keys -t record C-c
wait_for 'goes on from there'
type_line "$batch"
wait_for 'stories.jsonl: '
type_line 'tail -1 stories.jsonl'
wait_for 'header has 3"'
end
