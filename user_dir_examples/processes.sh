# Sourced by scripts that start several processes. Ctrl-C, and a signal to the script alone, ends
# all of them; a plain "command &" would ignore Ctrl-C, and bash waits for any other command to end
# before it minds a signal.
set -m # each job is a process group of its own
end_jobs() {
    trap - INT TERM EXIT
    exec 2>/dev/null # bash would report every job that was ended
    for job in $(jobs -p); do kill -TERM -- "-$job" 2>/dev/null || true; done
    wait
}
trap 'end_jobs; exit 130' INT TERM
trap end_jobs EXIT
run() { # a command and its arguments
    "$@" &
    wait $!
}
