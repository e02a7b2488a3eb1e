package provision

import (
	"strings"
	"testing"
	"time"
)

func TestStartDecision(t *testing.T) {
	handed, taken := &HandoverMark{Node: "node1"}, &HandoverMark{Node: "node1", Taken: true}
	for _, c := range []struct {
		mark     *HandoverMark
		takeBack bool
		want     StartKind
	}{
		{nil, false, StartServe}, {nil, true, StartServe},
		{handed, false, StartHandOut}, {handed, true, StartTakeBack},
		{taken, false, StartRefuse}, {taken, true, StartTakeBack},
	} {
		if got := StartDecision(c.mark, c.takeBack); got != c.want {
			t.Errorf("%+v, take back %v: %s, want %s", c.mark, c.takeBack, got, c.want)
		}
	}
}

func TestCheckHandover(t *testing.T) {
	order := func(kind OrderKind, state OrderState) Orders {
		return Orders{{Order: Order{ID: 7, Kind: kind}, State: state}}
	}
	ready := func() []State {
		return []State{{Name: "node1", Stage: StageReady}, {Name: "node2", Stage: StageOff}}
	}
	for name, c := range map[string]struct {
		node, self string
		networks   int
		change     func([]State)
		orders     map[string]Orders
		roll       *Roll
		want, busy string // what hinders; empty: nothing
	}{
		"free":               {},
		"a past":             {orders: map[string]Orders{"node1": order(OrderHandover, OrderFailed)}, roll: &Roll{Ended: true}},
		"another node":       {node: "node2", want: "node2 is off, not ready", busy: "not ready"},
		"no node":            {node: "node9", want: "no node of the rack", busy: "no node of the rack"},
		"itself":             {self: "node1", want: "is the disc host", busy: "is the disc host"},
		"networks":           {networks: 2, want: "2 networks", busy: "2 networks"},
		"its own reinstall":  {change: func(s []State) { s[0].GrantOpen = true }, want: "is to be reinstalled", busy: "is to be reinstalled"},
		"another's install":  {change: func(s []State) { s[1].GrantOpen = true }, want: "install of node2"},
		"another's order":    {orders: map[string]Orders{"node2": order(OrderStage, OrderAccepted)}, want: "node2 has not ended order 7"},
		"another handover":   {orders: map[string]Orders{"node2": order(OrderHandover, OrderWaiting)}, want: "handover to node2", busy: "handover to node2"},
		"a roll":             {roll: &Roll{}, want: "another release", busy: "another release"},
		"order that is over": {orders: map[string]Orders{"node2": order(OrderStage, OrderDone)}},
	} {
		states := ready()
		if c.change != nil {
			c.change(states)
		}
		if c.node == "" {
			c.node = "node1"
		}
		if c.networks == 0 {
			c.networks = 1
		}
		for _, busy := range []bool{false, true} {
			want := c.want
			if busy {
				want = c.busy
			}
			got := strings.Join(CheckHandover(c.node, c.self, c.networks, states, c.orders, c.roll, HandoverRequest{Busy: busy}), "; ")
			if want == "" && got != "" || !strings.Contains(got, want) {
				t.Errorf("%s, busy %v: %q, want %q", name, busy, got, want)
			}
		}
	}
}

func TestHandoverPaths(t *testing.T) {
	for p, want := range map[string]bool{
		"platter": true, "store/objects/ab": true, "rack/rack.yaml": true, "rack/keys/a b.pub": true, "state/site/site.json": true, "stack/a/b": true, "ipxe/ipxe.efi": true,
		"": false, "store": false, "store/": false, "/store/x": false, "store/../x": false, "../store/x": false, "platter/x": false, "receipt.json": false, "other/x": false, "store//x": false,
	} {
		if ValidHandoverPath(p) != want {
			t.Errorf("%q: %v", p, !want)
		}
	}
}

// An order for a handover that was taken back has failed: nobody carries it on.
func TestTakeBackEndsTheOrder(t *testing.T) {
	now := time.Unix(1_790_000_000, 0)
	var o Orders
	o, _ = o.Apply(Event{ID: 1, Kind: EventOrder, Node: "node1", Order: &Order{Kind: OrderHandover}})
	o, _ = o.Apply(Event{ID: 2, Kind: EventOrder, Node: "node1", Order: &Order{Kind: OrderStage}})
	o, _ = o.Apply(o[0].Accept())
	o, changed := o.Apply(Event{ID: 3, Time: now, Kind: EventTakeBack, Node: "node1"})
	if !changed || o[0].State != OrderFailed || o[0].Failure.Code != "taken-back" || !o[0].Since.Equal(now) || o[1].State != OrderWaiting {
		t.Errorf("%+v", o)
	}
}
