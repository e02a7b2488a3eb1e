package stack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"platter/provision"
)

// evaluator runs one Erlang expression in the local member's machine and
// returns the string it evaluates to.
type evaluator func(ctx context.Context, expr string) (string, error)

// errUnreachable: the member's machine does not answer. Every other error is
// an answer.
var errUnreachable = errors.New("it does not answer on its distribution port")

// erlCall is the evaluator over erl_call, for the member with its distribution
// at addr. command makes the process that runs erl_call as the service's user,
// with its home, where erl_call finds the cookie. Expressions go through standard
// input: nothing secret is seen in a process list.
func erlCall(service, node string, addr netip.AddrPort, command func(ctx context.Context, name string, args ...string) *exec.Cmd) evaluator {
	return func(ctx context.Context, expr string) (string, error) {
		var out, stderr bytes.Buffer
		// Of two callers of one name the second is refused, and erl_call's own
		// random name (-r) is the same for a whole second. Names are few: each
		// becomes an atom, which Erlang never forgets.
		caller := fmt.Sprintf("platter%d", rand.IntN(10000))
		cmd := command(ctx, "/usr/bin/erl_call", "-h", caller, "-address", addr.String(), "-e")
		cmd.Stdin = strings.NewReader(expr + "\n")
		cmd.Stdout, cmd.Stderr = &out, &stderr
		cmd.WaitDelay = time.Second
		if err := cmd.Run(); err != nil {
			if ctx.Err() != nil {
				return "", fmt.Errorf("%s on node %s: %w", service, node, context.Cause(ctx))
			}
			return "", fmt.Errorf("%s on node %s: %w: %s", service, node, errUnreachable, strings.TrimSpace(stderr.String()+" "+err.Error()))
		}
		s, err := parseReply(out.String())
		if err != nil {
			return "", fmt.Errorf("%s on node %s: %w", service, node, err)
		}
		return s, nil
	}
}

// parseReply reads what erl_call prints: {ok, "string"} or {error, "text"}.
func parseReply(out string) (string, error) {
	out = strings.TrimSpace(out)
	if s, ok := strings.CutPrefix(out, "{ok, "); ok && strings.HasSuffix(s, "}") {
		if s, err := strconv.Unquote(strings.TrimSuffix(s, "}")); err == nil {
			return s, nil
		}
	}
	if len(out) > 500 {
		out = out[:500] + " ..."
	}
	return "", fmt.Errorf("unexpected answer %q", out)
}

// status is the local member as it sees itself.
type status struct {
	up         bool     // the application ejabberd has started
	joining    bool     // a join runs
	known      []string // nodes in the database's schema, with this one
	running    []string // of those, the ones whose database runs and knows that ours does
	incomplete bool     // tables of the cluster have no copy here
}

func (s status) others(self string) []string {
	return slices.DeleteFunc(slices.Clone(s.known), func(n string) bool { return n == self })
}

// statusExpr leaves out of the running those who do not see this member run:
// where only one side has noticed a split, both sides shall be told of it.
const statusExpr = `
	Mutual = fun(All) ->
		Others = All -- [node()],
		Views = lists:zip(Others, erpc:multicall(Others, mnesia, system_info, [running_db_nodes], 2000)),
		All -- [N || {N, {ok, Sees}} <- Views, not lists:member(node(), Sees)]
	end,
	Names = fun(L) -> lists:join(",", [lists:nthtail(length("ejabberd@"), atom_to_list(A)) || A <- lists:sort(L)]) end,
	{Known, Running, Missing} = case mnesia:system_info(is_running) of
		yes -> {mnesia:system_info(db_nodes), Mutual(mnesia:system_info(running_db_nodes)),
			[T || T <- mnesia:system_info(tables), mnesia:table_info(T, storage_type) == unknown]};
		_ -> {[], [], []}
	end,
	lists:flatten(io_lib:format("up=~s joining=~s incomplete=~s known=~s running=~s", [
		lists:keymember(ejabberd, 1, application:which_applications(60000)),
		whereis(platter_join) =/= undefined, Missing =/= [], Names(Known), Names(Running)])).`

func parseStatus(text string) (status, error) {
	var s status
	for _, field := range strings.Fields(text) {
		k, v, _ := strings.Cut(field, "=")
		switch k {
		case "up":
			s.up = v == "true"
		case "joining":
			s.joining = v == "true"
		case "incomplete":
			s.incomplete = v == "true"
		case "known", "running":
			var names []string
			if v != "" {
				names = strings.Split(v, ",")
			}
			if k == "known" {
				s.known = names
			} else {
				s.running = names
			}
		default:
			return s, fmt.Errorf("status %q: unknown field %q", text, k)
		}
	}
	return s, nil
}

// joinExpr makes the local member, which must hold nothing worth keeping, a
// member of target's cluster. It goes on when erl_call is killed; a second one
// while it runs answers "busy".
//
// A node that was installed anew is still in the cluster's schema under its
// name. Mnesia takes it back as it is: with its own schema deleted it loads
// the cluster's, in which it has copies of everything. Nothing has to be
// forgotten first. ejabberd's leave_cluster must not be used for it: it halts
// a node that answers.
//
// The join stops and starts the application ejabberd, which would tell systemd
// that the service is stopping; systemd would kill it when the stop timeout
// ends. So its messenger is held until the application stops it.
func joinExpr(target string) string {
	return `
	case catch register(platter_join, self()) of
		true ->
			catch sys:suspend(ejabberd_systemd),
			R = (catch ejabberd_cluster:join(` + atom(erlangNode(target)) + `)),
			catch sys:resume(ejabberd_systemd),
			lists:flatten(io_lib:format("~0p", [R]));
		_ -> "busy"
	end.`
}

// waitJoinExpr returns when no join runs any more.
const waitJoinExpr = `
	case whereis(platter_join) of
		undefined -> "idle";
		Pid -> M = monitor(process, Pid), receive {'DOWN', M, _, _, _} -> "idle" end
	end.`

// accountExpr makes sure the account of a probe exists with that password, and
// empties it of what probes cannot take away themselves, or were killed before
// they did: archived and waiting messages, files on this node.
func accountExpr(user, domain, password string) string {
	return fmt.Sprintf(`
	U = %s, D = %s, P = %s,
	[catch M:remove_user(U, D) || M <- [mod_mam, mod_offline, mod_http_upload]],
	case ejabberd_auth:check_password(U, <<>>, D, P) of
		true -> "present";
		false ->
			R = case ejabberd_auth:try_register(U, D, P) of
				{error, exists} -> ejabberd_auth:set_password(U, D, P);
				Other -> Other
			end,
			lists:flatten(io_lib:format("~0p", [R]))
	end.`, binary(user), binary(domain), binary(password))
}

// loadExpr makes sure that accounts exist with these passwords. A new one costs
// the node one hash of a password, one that is there as well.
func loadExpr(domain string, accounts []provision.Account) string {
	var list []string
	for _, a := range accounts {
		list = append(list, "{"+binary(a.User)+","+binary(a.Password)+"}")
	}
	return fmt.Sprintf(`
	D = %s,
	Make = fun(U, P) ->
		case ejabberd_auth:try_register(U, D, P) of
			{error, exists} ->
				case ejabberd_auth:check_password(U, <<>>, D, P) of
					true -> ok;
					false -> ejabberd_auth:set_password(U, D, P)
				end;
			Other -> Other
		end
	end,
	case lists:usort([Make(U, P) || {U, P} <- [%s]]) -- [ok] of
		[] -> "ok";
		Errors -> lists:flatten(io_lib:format("~0p", [Errors]))
	end.`, binary(domain), strings.Join(list, ","))
}

// removeLoadExpr removes up to limit accounts of simulated users, with all
// that modules keep of them, and tells "REMOVED of FOUND". Some authentication
// backends ignore the prefix; that of SQL takes it with a limit only.
func removeLoadExpr(domain string, limit int) string {
	return fmt.Sprintf(`
	D = %[1]s,
	All = [U || {U, _} <- ejabberd_auth:get_users(D, [{prefix, %[2]s}, {limit, 1000000}, {offset, 0}]), re:run(U, ["^", %[2]s, "[0-9]+$"]) =/= nomatch],
	Gone = [U || U <- lists:sublist(All, %[3]d), ejabberd_auth:remove_user(U, D) =:= ok],
	lists:flatten(io_lib:format("~b of ~b", [length(Gone), length(All)])).`, binary(domain), binary(provision.LoadPrefix), limit)
}

// syncExpr makes what was committed durable: Mnesia alone loses the last
// seconds in a power cut.
const syncExpr = `lists:flatten(io_lib:format("~0p", [mnesia:sync_log()])).`

// atom quotes a name that check has found to be harmless.
func atom(s string) string { return "'" + s + "'" }

// binary writes s as its bytes: no character of it can end the expression.
func binary(s string) string {
	var b strings.Builder
	b.WriteString("<<")
	for i := range len(s) {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(strconv.Itoa(int(s[i])))
	}
	b.WriteString(">>")
	return b.String()
}
