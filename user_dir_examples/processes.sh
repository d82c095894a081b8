# Sourced by scripts that start several processes. Ctrl-C, and a signal to the script alone, ends
# all of them. A plain "command &" would ignore Ctrl-C; and while bash runs a command that is no job,
# it minds no signal.
end_jobs() {
    trap - INT TERM EXIT
    exec 2>/dev/null # bash would report every job that was ended
    for job in $(jobs -p); do kill -TERM -- "-$job" || true; done
    wait
}
trap 'end_jobs; exit 130' INT TERM
trap end_jobs EXIT
start() { # a command and its arguments; it is a process group of its own, $! its number
    set -m
    "$@" &
    set +m # or bash would report every job that ends badly
}
run() {
    start "$@"
    wait $!
}
