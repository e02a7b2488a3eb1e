package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"aead.dev/minisign"
	"github.com/spf13/cobra"

	"platter/provision/accept"
	"platter/provision/client"
)

func acceptCmd(op func() *client.Operator) *cobra.Command {
	var o accept.Options
	var output, dir, verify, key string
	var yes bool
	c := &cobra.Command{
		Use: "accept", Short: "Test a delivered rack: probes, load, limits, a failing node; write a signed report", Args: cobra.NoArgs,
		Long: `Test a delivered rack and write a signed report, accept-RACK-DATE.html, which
prints on A4. The cluster has to be whole. What is tested:

  every node checks itself, also the limits that the running service lives under
  all probes, on every node
  load: simulated users, as many as the rack file states
  the failure of a node while users write: its service is ended at once and
  started again after a while; then all probes again

Real users of the node that fails are logged out and have to log in again: it is
asked for first. The accounts of simulated users, platter-load-..., are made for
it and removed at the end, also after Ctrl-C. A service that was ended starts
again by itself, whatever happens to the disc host.

With --verify a report is compared with its signature instead, FILE.minisig.

Exit codes: 0 passed, 1 it could not be carried out, 3 not passed; the report
says why. With --verify: 0 the report is as it was written, 1 it is not.`,
		RunE: func(c *cobra.Command, _ []string) error {
			if verify != "" {
				return verifyReport(c.Context(), c.OutOrStdout(), op, verify, key)
			}
			if !o.NoFailure && !yes {
				ok, err := askFailure(c.Context(), c.InOrStdin(), c.ErrOrStderr(), op(), o)
				if err != nil || !ok {
					return err
				}
			}
			return runAccept(c.Context(), c.OutOrStdout(), c.ErrOrStderr(), op(), o, dir, output)
		},
	}
	f := c.Flags()
	f.IntVar(&o.Users, "users", 0, "simulated users; without it, as many as the rack file states")
	f.DurationVar(&o.For, "for", time.Minute, "how long they write")
	f.DurationVar(&o.Every, "every", 10*time.Second, "from one message of a user to the next")
	f.BoolVar(&o.NoFailure, "no-failure", false, "let no node fail")
	f.StringVar(&o.Node, "node", "", "the node that fails; without it, the last one of the rack file")
	f.DurationVar(&o.Outage, "outage", 30*time.Second, "how long its service stays away")
	f.BoolVar(&yes, "yes", false, "let it fail without asking")
	f.DurationVar(&o.P99, "p99", time.Second, "limit: 99 of 100 messages arrive within it")
	f.IntVar(&o.Lost, "lost", 0, "limit: messages that may be lost while all nodes run")
	f.DurationVar(&o.Back, "back", time.Minute, "limit: all users are in again within it, after a node failed")
	f.DurationVar(&o.Whole, "whole", 5*time.Minute, "limit: the cluster is whole within it, once the node starts again")
	f.StringVar(&dir, "dir", ".", "folder for the report")
	f.StringVar(&verify, "verify", "", "compare this report with its signature, and test nothing")
	f.StringVar(&key, "key", "", "with --verify: the public key; without it, the disc host is asked")
	tableOrJSON(c, &output)
	return c
}

// askFailure tells what the failure means and waits for a yes.
func askFailure(ctx context.Context, in io.Reader, out io.Writer, op *client.Operator, o accept.Options) (bool, error) {
	nodes, err := op.Nodes(ctx)
	if err != nil {
		return false, err
	}
	name, known := o.Node, 0
	for _, n := range nodes {
		if n.Known {
			known++
			if o.Node == "" {
				name = n.Name // the last one
			}
		}
	}
	if known < 2 {
		return true, nil // nobody would be left: no node fails
	}
	fmt.Fprintf(out, "The messaging service of %s will be ended and started again %s later; its users have to log in again.\nGo on? (yes/no; --no-failure leaves this out) ", name, o.Outage)
	line, err := bufio.NewReader(in).ReadString('\n')
	if err != nil && line == "" {
		return false, fmt.Errorf("nobody answered: give --yes, or --no-failure")
	}
	if a := strings.ToLower(strings.TrimSpace(line)); a != "yes" && a != "y" {
		return false, errors.New("nothing was tested")
	}
	return true, nil
}

func runAccept(ctx context.Context, out, progress io.Writer, op *client.Operator, o accept.Options, dir, output string) error {
	if st, err := os.Stat(dir); err != nil || !st.IsDir() {
		return fmt.Errorf("the report cannot be written: %s is not a folder", dir)
	}
	var last client.AcceptNews
	for n, err := range op.Accept(ctx, o) {
		if err != nil {
			if ctx.Err() != nil {
				fmt.Fprintln(progress, "The disc host removes the accounts of simulated users; a node's service that was ended starts again by itself: see 'platter node orders'.")
				return ctx.Err()
			}
			return err
		}
		last = n
		switch {
		case n.Total > 0:
			fmt.Fprintf(progress, "%-9s %s (%d of %d)\n", n.Step, n.Line, n.Done, n.Total)
		case n.Line != "":
			fmt.Fprintf(progress, "%-9s %s\n", n.Step, n.Line)
		}
	}
	switch {
	case last.Failed != "":
		return fmt.Errorf("the acceptance could not be carried out: %s", last.Failed)
	case last.Name == "":
		return errors.New("the disc host broke off before the acceptance was done: see its log")
	}
	name := filepath.Join(dir, filepath.Base(last.Name))
	if err := errors.Join(os.WriteFile(name, last.HTML, 0o644), os.WriteFile(name+".minisig", last.Signature, 0o644)); err != nil {
		return fmt.Errorf("the report cannot be written: %w", err)
	}
	if output == "json" {
		if err := printJSON(out, json.RawMessage(last.Report)); err != nil {
			return err
		}
	} else if last.Passed {
		fmt.Fprintf(out, "Passed. The report is %s, signed by %s.minisig.\n", name, name)
	} else {
		fmt.Fprintln(out, "Not passed:")
		for _, w := range last.Wrong {
			fmt.Fprintf(out, "- %s\n", w)
		}
		fmt.Fprintf(out, "The report is %s, signed by %s.minisig.\n", name, name)
	}
	if !last.Passed {
		return notPassed
	}
	return nil
}

// notPassed is the exit code of 'stack accept' where something is not as it
// should be.
const notPassed = said(3)

func verifyReport(ctx context.Context, out io.Writer, op func() *client.Operator, file, text string) error {
	html, err1 := os.ReadFile(file)
	signature, err2 := os.ReadFile(file + ".minisig")
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	if text == "" {
		k, err := op().SiteKey(ctx)
		if err != nil {
			return fmt.Errorf("%w. Or name the key with --key", err)
		}
		text = k.Key
	}
	var key minisign.PublicKey
	if err := key.UnmarshalText([]byte(strings.TrimSpace(text))); err != nil {
		return fmt.Errorf("%q is no minisign public key: 'platter stack key' prints it", text)
	}
	if err := accept.Verify(key, html, signature); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	_, err := fmt.Fprintf(out, "%s is as the disc host with the key %016X has written it.\n", file, key.ID())
	return err
}

func siteKeyCmd(op func() *client.Operator) *cobra.Command {
	return &cobra.Command{
		Use: "key", Short: "Print the public key that the disc host's reports are signed with", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			k, err := op().SiteKey(c.Context())
			if err == nil {
				_, err = fmt.Fprintln(c.OutOrStdout(), k.Key)
			}
			return err
		},
	}
}
