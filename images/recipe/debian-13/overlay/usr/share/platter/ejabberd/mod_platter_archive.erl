%% A message is in its recipient's archive before the server acknowledges it.
%%
%% mod_mam archives for a recipient where the recipient is logged in. What is on
%% its way to a node that has just died is then in no archive, although the
%% sender's stream has acknowledged it (XEP-0198). So here the sender's node
%% archives, while it routes. While the database has no node that takes writes,
%% the sender's stream waits: it acknowledges nothing that is not kept.
-module(mod_platter_archive).
-behaviour(gen_mod).
-export([start/2, stop/1, reload/3, depends/2, mod_options/1, mod_doc/0, keep/1]).

%% How long a stream waits for the database, ms.
-define(PATIENCE, 60000).
-define(PAUSE, 500).

start(_Host, _Opts) ->
    %% After mod_mam (50) has given the message its identity.
    {ok, [{hook, sm_receive_packet, keep, 60}]}.

stop(_Host) -> ok.
reload(_Host, _New, _Old) -> ok.
depends(_Host, _Opts) -> [{mod_mam, hard}].
mod_options(_Host) -> [].
mod_doc() -> #{desc => <<"Archives messages for their recipients on the sender's node.">>}.

keep(Packet) when element(1, Packet) == message ->
    Type = xmpp:get_type(Packet),
    case Type /= error andalso Type /= groupchat andalso has_text(Packet) of
        true -> keep(Packet, deadline());
        false -> Packet
    end;
keep(Packet) -> Packet.

keep(Packet, Deadline) ->
    case mod_mam:offline_message({none, Packet}) of
        {archived, Kept} ->
            %% mod_mam says so also while the database is away: look.
            case kept(Kept) of
                true -> Kept;
                _ -> again(Packet, Kept, Deadline)
            end;
        {_, Same} -> Same % a hint or the user's own wish keeps it out
    end.

%% Nothing is written twice: what an unclear answer was about may be there.
again(Packet, Kept, Deadline) ->
    timer:sleep(?PAUSE),
    case erlang:monotonic_time(millisecond) < Deadline of
        true ->
            case kept(Kept) of
                true -> Kept;
                false -> keep(Packet, Deadline);
                unknown -> again(Packet, Kept, Deadline)
            end;
        false -> Packet
    end.

kept(Packet) ->
    {User, Host, _} = jid:tolower(xmpp:get_to(Packet)),
    Id = xmpp:get_meta(Packet, stanza_id),
    Query = [<<"select 1 from archive where username='">>, ejabberd_sql:escape(User),
             <<"' and timestamp=">>, integer_to_binary(Id)],
    case ejabberd_sql:sql_query(Host, Query) of
        {selected, _, []} -> false;
        {selected, _, _} -> true;
        _ -> unknown
    end.

deadline() -> erlang:monotonic_time(millisecond) + ?PATIENCE.

has_text(Packet) -> xmpp:get_text(element(8, Packet)) /= <<>> orelse xmpp:get_text(element(7, Packet)) /= <<>>.
