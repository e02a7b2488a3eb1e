package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"platter/hostprep/hostcmd"
	"platter/provision"
	"platter/provision/client"
)

func ordersCmd(op func() *client.Operator) *cobra.Command {
	var output string
	c := &cobra.Command{
		Use: "orders [NODE]", Short: "List what nodes were ordered to do, and what came of it", Args: cobra.MaximumNArgs(1),
		Long: `List what nodes were ordered to do, and what came of it, oldest first. Of each
node the last 64 orders are kept.

A node carries out one order at a time. An order is waiting until the node has
asked for it, then accepted, then done or failed. One that waits can be
withdrawn; reinstalling the node withdraws it too.`,
		RunE: func(c *cobra.Command, args []string) error {
			orders, err := op().Orders(c.Context(), strings.Join(args, ""))
			if err != nil {
				return err
			}
			if output == "json" {
				return printJSON(c.OutOrStdout(), orders)
			}
			return printOrders(c.OutOrStdout(), orders, time.Now())
		},
	}
	tableOrJSON(c, &output)
	c.AddCommand(
		&cobra.Command{
			Use: "show ID", Short: "Print one order with its arguments and its result, as JSON", Args: cobra.ExactArgs(1),
			RunE: func(c *cobra.Command, args []string) error {
				id, err := orderID(args[0])
				if err != nil {
					return err
				}
				for o, err := range op().FollowOrder(c.Context(), id) {
					if err != nil {
						return err
					}
					return printJSON(c.OutOrStdout(), o)
				}
				return fmt.Errorf("the disc host said nothing of order %d", id)
			},
		},
		changeCmd(op, "withdraw ID", "Take an order back that its node has not asked for yet", 1,
			func(ctx context.Context, o *client.Operator, args []string) (string, error) {
				id, err := orderID(args[0])
				if err != nil {
					return "", err
				}
				s, err := o.WithdrawOrder(ctx, id)
				return fmt.Sprintf("%s will not do %s", s.Node, s.Order), err
			}))
	return c
}

func orderID(s string) (int64, error) {
	id, err := strconv.ParseInt(s, 10, 64)
	if err != nil || id < 1 {
		return 0, fmt.Errorf("%q is not the number of an order: see 'platter node orders'", s)
	}
	return id, nil
}

func printOrders(w io.Writer, orders []provision.OrderStatus, now time.Time) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "ID\tNODE\tORDER\tSTATE\tAGE\tOUTCOME\t")
	for _, o := range orders {
		fmt.Fprintf(tw, "%d\t%s\t%s\t%s\t%s\t%s\t\n", o.ID, o.Node, o.Kind, o.State, now.Sub(o.Created).Round(time.Second), orderOutcome(o))
	}
	return tw.Flush()
}

// orderOutcome is in words what became of an order.
func orderOutcome(o provision.OrderStatus) string {
	switch o.State {
	case provision.OrderWaiting:
		return "withdrawn if " + o.Node + " does not ask for it until " + o.Deadline.Local().Format("2006-01-02 15:04:05")
	case provision.OrderAccepted:
		return or(orderProgress(o))
	case provision.OrderDone:
		return fmt.Sprintf("after %s", o.Since.Sub(o.Created).Round(time.Second))
	case provision.OrderFailed:
		return o.Failure.Code + ": " + o.Failure.Error()
	}
	return or(o.Why)
}

func orderProgress(o provision.OrderStatus) string {
	if o.Total > 0 {
		return fmt.Sprintf("%s (%d %%)", o.Line, 100*o.Done/o.Total)
	}
	return o.Line
}

func diagnoseCmd(op func() *client.Operator) *cobra.Command {
	var output string
	var within time.Duration
	c := &cobra.Command{
		Use: "diagnose NODE", Short: "Have a node check itself now, and show what deviates", Args: cobra.ExactArgs(1),
		Long: `Have a node check itself now, and show what deviates: the host, as 'host check'
on the node would, its alarms, the components of the service that do not work and
why, and the cluster as the node sees it. It changes nothing. The node does it also while it is not a member of the cluster.

Exit codes: 0 as it should be, 1 the node could not do it or a check failed,
3 something deviates, waits for a reboot, does not work, or misses members of the
cluster.`,
		RunE: func(c *cobra.Command, args []string) error {
			o, err := orderAndWait(c.Context(), op(), c.ErrOrStderr(), args[0], provision.OrderDiagnose, nil, within)
			if err != nil {
				return err
			}
			var d provision.Diagnosis
			if err := json.Unmarshal(o.Result, &d); err != nil {
				return fmt.Errorf("what %s found cannot be read: %w", o.Node, err)
			}
			results, err := hostcmd.Unmarshal(d.Host)
			if err != nil {
				return fmt.Errorf("what %s found cannot be read: %w", o.Node, err)
			}
			code := hostcmd.Code(results)
			if code == 0 && (d.Stack != "" || len(d.Down) > 0 || len(d.Alarms) > 0 || len(d.Troubles) > 0) {
				code = int(notWhole)
			}
			if output == "json" {
				err = printJSON(c.OutOrStdout(), d)
			} else if err = hostcmd.WriteCheck(c.OutOrStdout(), results); err == nil {
				printDiagnosis(c.OutOrStdout(), o.Node, d)
			}
			if err == nil && code != 0 {
				err = said(code)
			}
			return err
		},
	}
	tableOrJSON(c, &output)
	c.Flags().DurationVar(&within, "within", 2*time.Minute, "give up when the node has not asked for the order for this long")
	return c
}

func printDiagnosis(w io.Writer, node string, d provision.Diagnosis) {
	for _, a := range d.Alarms {
		fmt.Fprintf(w, "Alarm: %s.\n", a)
	}
	for _, t := range d.Troubles {
		fmt.Fprintf(w, "Trouble: %s.\n", t)
	}
	switch {
	case d.Stack != "":
		fmt.Fprintf(w, "The messaging service of %s does not answer: %s\n", node, d.Stack)
	case len(d.Down) > 0:
		fmt.Fprintf(w, "%s sees %s in the cluster, and misses %s.\n", node, strings.Join(d.Running, ", "), strings.Join(d.Down, ", "))
	default:
		fmt.Fprintf(w, "%s sees %s in the cluster, and misses nobody.\n", node, strings.Join(d.Running, ", "))
	}
}

// orderAndWait gives an order and returns it when it is done. What happens
// meanwhile is said to progress. A command that ends before the node has asked
// for the order withdraws it.
func orderAndWait(ctx context.Context, op *client.Operator, progress io.Writer, node string, kind provision.OrderKind, args any, within time.Duration) (provision.OrderStatus, error) {
	o, err := op.Order(ctx, node, kind, args, within)
	if err != nil {
		return o, err
	}
	return awaitOrder(ctx, op, progress, node, o.ID)
}

// awaitOrder returns an order when it is done, see orderAndWait.
func awaitOrder(ctx context.Context, op *client.Operator, progress io.Writer, node string, id int64) (o provision.OrderStatus, err error) {
	said := ""
	for o, err = range op.FollowOrder(ctx, id) {
		if err != nil {
			break
		}
		line := string(o.State)
		if o.State == provision.OrderWaiting {
			line = "waits for " + node
		} else if p := orderProgress(o); p != "" {
			line = p
		}
		if line != said && !o.State.Final() {
			said = line
			fmt.Fprintf(progress, "order %d: %s\n", id, line)
		}
	}
	switch {
	case err != nil && ctx.Err() != nil:
		short, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if _, kept := op.WithdrawOrder(short, id); kept != nil {
			fmt.Fprintf(progress, "order %d goes on: see 'platter node orders %s'\n", id, node)
		}
		return o, ctx.Err()
	case err != nil:
		return o, fmt.Errorf("%w. Order %d goes on: see 'platter node orders show %d'", err, id, id)
	case o.State == provision.OrderFailed:
		return o, fmt.Errorf("%s: %w", node, o.Failure)
	case o.State == provision.OrderWithdrawn:
		return o, fmt.Errorf("order %d was withdrawn: %s. See 'platter node show %s'", id, o.Why, node)
	case o.State != provision.OrderDone:
		return o, fmt.Errorf("the disc host said nothing of the end of order %d: see 'platter node orders show %d'", id, id)
	}
	return o, nil
}
