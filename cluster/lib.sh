# Shared by cluster/up, cluster/down and cluster/story. Sourced, never run.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
run=${PALYRA_CLUSTER_DIR:-$here/.run}   # everything that a cluster leaves on this machine is below this folder
base=${PALYRA_BASE_PORT:-7440}          # replica N listens on base + 10 (N-1) and the five ports after it
host=127.0.0.1

die() { printf 'error: %s\n' "$*" >&2; exit 1; }
port() { echo $((base + 10 * ($1 - 1) + $2)); } # port REPLICA OFFSET
node_port() { port "$1" 1; }
enrol_port() { port "$1" 2; }
endpoints() { local n list=""; for n in "$@"; do list="$list,$host:$(node_port "$n")"; done; echo "${list#,}"; }
enrol_endpoints() { local n list=""; for n in "$@"; do list="$list,$host:$(enrol_port "$n")"; done; echo "${list#,}"; }
palyra() { PALYRA_HOME="$run/operator" "$run/bin/palyra" "$@"; }

# The first value of a field in JSON on standard input; enough for the flat answers of `palyra -o json`.
field() { grep -o "\"$1\": *\"\{0,1\}[^\",}]*" | head -n 1 | sed 's/^"[^"]*": *"\{0,1\}//'; }

# A process is ours only if its id and its start time are those that we wrote down: ids are used again.
started_at() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 20; }
remember() { echo "$2 $(started_at "$2")" >"$run/$1.pid"; }
alive() { # alive NAME: prints the process id of a live process of ours
    local pid start
    read -r pid start 2>/dev/null <"$run/$1.pid" || return 1
    [ -n "$start" ] && [ "$(started_at "$pid")" = "$start" ] && echo "$pid"
}

# start NAME COMMAND...: in the background, in its own session, with log files; survives this shell.
start() {
    local name=$1
    shift
    mkdir -p "$run/logs"
    setsid nohup "$@" >"$run/logs/$name.out" 2>"$run/logs/$name.err" </dev/null &
    local pid=$!
    disown "$pid" # or this shell would comment on its end
    remember "$name" "$pid"
}

# stop NAME SIGNAL: ends exactly that process, and waits until it is gone; after 10 s it is killed.
stop() {
    local pid tries=0
    pid=$(alive "$1") || { rm -f "$run/$1.pid"; return 0; }
    kill "-${2:-TERM}" "$pid" 2>/dev/null || true
    while alive "$1" >/dev/null; do
        tries=$((tries + 1))
        [ "$tries" = 100 ] && kill -KILL "$pid" 2>/dev/null
        [ "$tries" -gt 150 ] && die "process $pid ($1) does not end"
        sleep 0.1
    done
    rm -f "$run/$1.pid"
}

# await SECONDS WHAT COMMAND...: runs the command until it succeeds.
await() {
    local until=$(($(date +%s) + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ "$(date +%s)" -ge "$until" ] && die "gave up waiting for $what; the logs are in $run/logs"
        sleep 0.1
    done
}

ready() { grep -q '^palyrad ready' "$run/logs/$1.out" 2>/dev/null && alive "$1"; }
start_replica() { # start_replica N: runs the replica whose folder exists already
    start "r$1" "$run/bin/palyrad" run --config "$run/r$1/palyrad.toml"
    await 60 "replica r$1" ready_or_gone "r$1"
    alive "r$1" >/dev/null || die "replica r$1 did not start: $(tail -n 1 "$run/logs/r$1.err")"
}
ready_or_gone() { ready "$1" || ! alive "$1"; }
voters() { palyra cluster status -o json | field voters; }
has_voters() { [ "$(voters)" = "$1" ]; }

# Puts palyrad and palyra into $run/bin: built here, or taken from the folder that PALYRA_BIN names.
build() {
    if [ -z "${PALYRA_BIN:-}" ]; then
        . "$here/../.ci/toolchain.sh"
        say "building (the first time compiles RocksDB: about twenty minutes on two cores)"
        (cd "$here/.." && cargo build --locked --workspace --bin palyrad --bin palyra) || die "the build failed"
        PALYRA_BIN=$CARGO_TARGET_DIR/debug
    fi
    mkdir -p "$run/bin"
    # A running program's file cannot be written, but it can be replaced.
    for program in palyrad palyra; do
        cp "$PALYRA_BIN/$program" "$run/bin/$program.new" && mv -f "$run/bin/$program.new" "$run/bin/$program"
    done
}

# Births a cluster of three in $run: replica 1 with its root and first operator, then two that join by token.
birth() {
    local n
    palyra cluster init --data-dir "$run/r1" --name r1 --listen-host "$host" --base-port "$(port 1 0)" --context local
    start_replica 1
    for n in 2 3; do
        palyra cluster join-token --name "r$n" -o json | field token >"$run/r$n.token"
        "$run/bin/palyrad" join --token-file "$run/r$n.token" --data-dir "$run/r$n" --name "r$n" \
            --listen-host "$host" --base-port "$(port "$n" 0)"
        rm -f "$run/r$n.token"
        start_replica "$n"
    done
    palyra context add local --endpoints "$(endpoints 1 2 3)" >/dev/null
    await 60 "three voters" has_voters 3
}
