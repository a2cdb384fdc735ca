#!/usr/bin/env bash
# bash cluster/one_machine.sh
#
# A Ray head on this machine that stays up between commands, with token authentication on and the dashboard reachable
# from here only. Then, in another terminal: bigray submit JOB --set storage=/absolute/folder
# It ends with Ctrl-C, and takes everything it runs with it.
set -euo pipefail
export RAY_AUTH_MODE=token
umask 077                                  # the token is for this user alone: Ray writes it as the umask lets it
ray get-auth-token --generate >/dev/null   # kept in ~/.ray/auth_token, where bigray and Ray's tools find it
exec ray start --head --block --dashboard-host=127.0.0.1 "$@"
