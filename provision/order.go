package provision

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"
)

// OrderKind says what an order wants done. A kind is idempotent: an order of
// it may be begun again after it was cut off at any point.
type OrderKind string

const (
	// OrderDiagnose checks the node and changes nothing: no args, a Diagnosis.
	OrderDiagnose OrderKind = "diagnose"
	// OrderStage brings a release of the stack onto the node's disk and changes
	// nothing that runs: a ReleaseRef, a Staged.
	OrderStage OrderKind = "stage"
	// OrderLoadAccounts makes the accounts of simulated users, or removes all
	// there are: LoadAccountsArgs, a LoadAccountsResult.
	OrderLoadAccounts OrderKind = "load-accounts"
	// OrderOutage ends the node's part of the stack at once and starts it again
	// later, also when nobody is there to ask for it: OutageArgs, no result.
	OrderOutage OrderKind = "outage"
	// OrderHandover makes the node the rack's disc host: no args, no result. It
	// ends at its new disc host, which is the node itself.
	OrderHandover OrderKind = "handover"
)

// Early tells whether a node carries orders of this kind out while it is not a
// member of the cluster yet. All others wait until it is past StageJoining.
func (k OrderKind) Early() bool { return k == OrderDiagnose || k == OrderStage || k == OrderReplace }

// Limits of orders.
const (
	MaxOrderArgs   = 64 << 10 // bytes of JSON
	MaxOrderResult = 1 << 20  // bytes of JSON
	MaxOrderLine   = 256      // bytes of a line of progress
	MaxOpenOrders  = 16       // of one node
	KeptOrders     = 64       // of one node, the newest; more than MaxOpenOrders
)

// Order is something that the disc host has a node do. Args hold no secrets:
// what a kind needs of these the node fetches over the node API.
type Order struct {
	// ID is the id of the event that gave it; in that event itself it is 0.
	ID   int64     `json:"id,omitempty"`
	Node string    `json:"node"`
	Kind OrderKind `json:"kind"`
	// Generation is the install that it is for: a reinstalled node is another.
	Generation int             `json:"generation"`
	Args       json.RawMessage `json:"args,omitempty"` // not in the journal's events
	Created    time.Time       `json:"created,omitzero"`
	// Deadline is until when the node may ask for it, by the disc host's
	// clock; after that it is withdrawn.
	Deadline time.Time `json:"deadline"`
}

func (o Order) String() string { return fmt.Sprintf("order %d (%s)", o.ID, o.Kind) }

// OrderState is where an order is.
type OrderState string

const (
	OrderWaiting   OrderState = "waiting"   // the node has not asked for it
	OrderAccepted  OrderState = "accepted"  // the node has it, and ends it one way or the other
	OrderDone      OrderState = "done"      // Result says what came of it
	OrderFailed    OrderState = "failed"    // Failure says why
	OrderWithdrawn OrderState = "withdrawn" // it was never handed out
)

// Final tells whether the order stays where it is.
func (s OrderState) Final() bool { return s != OrderWaiting && s != OrderAccepted }

// OrderNews is what a node says about an order that it has: how far it is, or
// how it ended.
type OrderNews struct {
	ID    int64      `json:"id"`
	State OrderState `json:"state,omitempty"` // OrderDone or OrderFailed; empty: progress
	// Result is what a done order found, not in the journal's events.
	Result  json.RawMessage `json:"result,omitempty"`
	Failure *Failure        `json:"failure,omitempty"` // of a failed order
	// Line says what is going on; Done of Total is how far it is.
	Line  string `json:"line,omitempty"`
	Done  int64  `json:"done,omitempty"`
	Total int64  `json:"total,omitempty"`
}

// OrderStatus is an order and what has become of it.
type OrderStatus struct {
	Order
	State  OrderState      `json:"state"`
	Since  time.Time       `json:"since"`         // of State
	Why    string          `json:"why,omitempty"` // withdrawn
	Result json.RawMessage `json:"result,omitempty"`
	// Failure is set while State is failed.
	Failure *Failure `json:"failure,omitempty"`
	// Progress, while State is accepted.
	Line  string `json:"line,omitempty"`
	Done  int64  `json:"done,omitempty"`
	Total int64  `json:"total,omitempty"`
}

// Orders are the orders of one node, oldest first: what its events add up to.
// Finished ones are forgotten when there are many. Args and results are not
// among it. The slice is never changed, only replaced.
type Orders []OrderStatus

// Apply returns the orders after e, and whether e changed them. Events come in
// journal order.
func (o Orders) Apply(e Event) (Orders, bool) {
	switch e.Kind {
	case EventOrder:
		if e.Order == nil {
			return o, false
		}
		n := OrderStatus{Order: *e.Order, State: OrderWaiting, Since: e.Time}
		n.ID, n.Node, n.Generation, n.Created, n.Args = e.ID, e.Node, e.Generation, e.Time, nil
		return append(slices.Clone(o[max(0, len(o)-KeptOrders+1):]), n), true
	case EventOrderAccept:
		return o.change(e.Time, func(s OrderStatus) bool { return e.Order != nil && s.ID == e.Order.ID && s.State == OrderWaiting },
			func(s *OrderStatus) { s.State = OrderAccepted })
	case EventOrderWithdraw:
		return o.change(e.Time, func(s OrderStatus) bool { return e.Order != nil && s.ID == e.Order.ID && s.State == OrderWaiting },
			func(s *OrderStatus) { s.State, s.Why = OrderWithdrawn, e.Detail })
	case EventGrant:
		return o.change(e.Time, func(s OrderStatus) bool { return s.State == OrderWaiting },
			func(s *OrderStatus) {
				s.State, s.Why = OrderWithdrawn, fmt.Sprintf("%s is to be reinstalled", s.Node)
			})
	case EventTakeBack:
		return o.change(e.Time, func(s OrderStatus) bool { return s.Kind == OrderHandover && !s.State.Final() },
			func(s *OrderStatus) {
				s.State, s.Failure = OrderFailed, &Failure{Code: "taken-back", Message: "the old disc host was made the disc host again", Next: "Hand the rack over anew if that is still wanted"}
			})
	case EventReport:
		switch {
		case e.Report == nil:
		case e.Report.Order != nil:
			return o.hear(e)
		case e.Report.Stage == StageInstalled || e.Report.Stage == StagePreparing:
			// What an older install had accepted, nobody knows of any more.
			return o.change(e.Time, func(s OrderStatus) bool { return !s.State.Final() && s.Generation < e.Generation },
				func(s *OrderStatus) {
					s.State, s.Failure = OrderFailed, &Failure{Code: "order-lost",
						Message: fmt.Sprintf("%s was reinstalled before it said how %s ended", s.Node, s.Order), Next: "Give the order again if it is still wanted"}
				})
		}
	}
	return o, false
}

// hear takes what a node says about one of its orders.
func (o Orders) hear(e Event) (Orders, bool) {
	n := e.Report.Order
	mine := func(s OrderStatus) bool {
		return s.ID == n.ID && s.State == OrderAccepted && s.Generation == e.Generation
	}
	switch n.State {
	case "":
		i := slices.IndexFunc(o, mine)
		if i < 0 {
			return o, false
		}
		o = slices.Clone(o)
		o[i].Line, o[i].Done, o[i].Total = n.Line, n.Done, n.Total
		return o, true
	case OrderDone:
		return o.change(e.Time, mine, func(s *OrderStatus) { s.State = OrderDone })
	case OrderFailed:
		return o.change(e.Time, mine, func(s *OrderStatus) { s.State, s.Failure = OrderFailed, n.Failure })
	}
	return o, false
}

// change moves those orders that which names to another state.
func (o Orders) change(now time.Time, which func(OrderStatus) bool, to func(*OrderStatus)) (Orders, bool) {
	out := o
	for i := range o {
		if !which(o[i]) {
			continue
		}
		if &out[0] == &o[0] {
			out = slices.Clone(o)
		}
		out[i].Since = now
		out[i].Line, out[i].Done, out[i].Total = "", 0, 0
		to(&out[i])
	}
	return out, len(o) > 0 && &out[0] != &o[0]
}

// Find returns the order with that ID.
func (o Orders) Find(id int64) (OrderStatus, bool) {
	i := slices.IndexFunc(o, func(s OrderStatus) bool { return s.ID == id })
	if i < 0 {
		return OrderStatus{}, false
	}
	return o[i], true
}

// Open counts the orders that are not final.
func (o Orders) Open() int {
	n := 0
	for _, s := range o {
		if !s.State.Final() {
			n++
		}
	}
	return n
}

// Next returns the order that a node of that generation carries out next: the
// oldest one that is not final, also when it was handed out before. A node
// that is no member of the cluster yet gets early ones only.
func (o Orders) Next(generation int, member bool) (OrderStatus, bool) {
	for _, s := range o {
		if !s.State.Final() && s.Generation == generation && (member || s.Kind.Early()) {
			return s, true
		}
	}
	return OrderStatus{}, false
}

// Overdue returns the events that withdraw what nobody asked for in time.
func (o Orders) Overdue(now time.Time) []Event {
	var out []Event
	for _, s := range o {
		if s.State == OrderWaiting && now.After(s.Deadline) {
			out = append(out, s.Withdraw(fmt.Sprintf("%s did not ask for it in time: it is off, or cannot reach the disc host", s.Node)))
		}
	}
	return out
}

// Accept is the event that hands the order out.
func (s OrderStatus) Accept() Event {
	return Event{Kind: EventOrderAccept, Node: s.Node, Generation: s.Generation, Order: s.brief(), Detail: s.Order.String()}
}

// Withdraw is the event that takes the order back.
func (s OrderStatus) Withdraw(why string) Event {
	return Event{Kind: EventOrderWithdraw, Node: s.Node, Generation: s.Generation, Order: s.brief(), Detail: why}
}

func (s OrderStatus) brief() *Order {
	o := s.Order
	o.Args = nil
	return &o
}

// Diagnosis is what an order of kind OrderDiagnose finds.
type Diagnosis struct {
	// Host is the outcome of every check of the host, as 'host check -o json'
	// prints it.
	Host json.RawMessage `json:"host"`
	// Running and Down are the members of the cluster as the node sees them.
	Running []string `json:"cluster_running"`
	Down    []string `json:"cluster_down"`
	// Stack says why the IM service of the node does not answer; empty: it does.
	Stack  string   `json:"stack,omitempty"`
	Alarms []string `json:"alarms"`
	// Troubles say what keeps the node's part of the service from working.
	Troubles []string `json:"troubles,omitempty"`
	// Limits are those that the running service lives under.
	Limits []InEffect `json:"limits,omitempty"`
	// Versions are those of the running kernel and of the installed packages
	// that make the host and the stack.
	Versions map[string]string `json:"versions,omitempty"`
	// Machine is what the node has; Disk is that of the root file system.
	Machine Machine `json:"machine"`
}

// InEffect is a value that was read from what runs, not from its configuration.
type InEffect struct {
	What string `json:"what"`
	OK   bool   `json:"ok"`
	Is   string `json:"is"`
	Want string `json:"should_be"`
}

// LoadAccountsArgs say how many simulated users there shall be. Their passwords
// follow from the site's secret, see StackSecrets.Load, which is in no order.
type LoadAccountsArgs struct {
	Users int `json:"users"` // 0: none, all are removed
}

// LoadAccountsResult is what an order of kind OrderLoadAccounts did.
type LoadAccountsResult struct {
	Made    int `json:"made"`
	Removed int `json:"removed"`
}

// OutageArgs say how long the stack stays away.
type OutageArgs struct {
	Seconds int `json:"seconds"` // 1 to MaxOutage
}

// OutageEnds is what a node says when its outage is over: its service starts.
const OutageEnds = "the service starts"

// MaxOutage bounds an outage that was ordered, in seconds.
const MaxOutage = 600
