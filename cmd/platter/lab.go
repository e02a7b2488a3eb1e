package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"platter/provision/yamlfile"
	"platter/vmtest"
)

// labFolder is where labs keep their state unless --state says otherwise.
const labFolder = "build/lab"

func labCmd() *cobra.Command {
	c := &cobra.Command{
		Use:   "lab",
		Short: "Blank virtual machines on a network of their own, to provision instead of servers",
		Long: `A lab is a set of blank libvirt machines, described in a lab file, on a bridge
in a network namespace that leads nowhere. It has a libvirtd of its own and
keeps everything in its state folder, ` + labFolder + `/NAME unless --state names one.
Several labs run side by side. Labs need root.

  platter lab up lab.yaml
  platter lab exec -- platter serve -c rack.yaml
  platter lab power on all
  platter lab console -f node1
  platter lab down`,
	}
	var state string
	c.PersistentFlags().StringVar(&state, "state", "", "the lab's state folder (default "+labFolder+"/NAME, or the only lab there)")
	open := func() (*vmtest.Lab, error) {
		dir, err := onlyLab(state)
		if err != nil {
			return nil, err
		}
		return vmtest.Open(dir)
	}
	c.AddCommand(labUpCmd(&state), labStatusCmd(open), labConsoleCmd(open), labPowerCmd(open), labInsertCmd(open), labExecCmd(open), labDownCmd(&state))
	return c
}

// onlyLab returns the state folder that was asked for, or that of the only lab.
func onlyLab(state string) (string, error) {
	if state != "" {
		return state, nil
	}
	found, err := filepath.Glob(filepath.Join(labFolder, "*", "lab.json"))
	if err != nil {
		return "", err
	}
	switch len(found) {
	case 0:
		return "", fmt.Errorf("there is no lab in %s: start one with platter lab up FILE, or name its state folder with --state", labFolder)
	case 1:
		return filepath.Dir(found[0]), nil
	}
	var dirs []string
	for _, f := range found {
		dirs = append(dirs, filepath.Dir(f))
	}
	return "", fmt.Errorf("there are several labs, choose one with --state: %s", strings.Join(dirs, ", "))
}

func labUpCmd(state *string) *cobra.Command {
	var on bool
	c := &cobra.Command{
		Use:   "up FILE",
		Short: "Make the lab that FILE describes, or bring a running one to it; new machines are off and blank",
		Args:  cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			cfg, err := vmtest.Load(args[0])
			var problems yamlfile.Problems
			if errors.As(err, &problems) {
				return fmt.Errorf("%s has %d %s, nothing was started:\n%w", args[0], len(problems), plural(len(problems), "mistake"), err)
			}
			if err != nil {
				return err
			}
			dir := *state
			if dir == "" {
				dir = filepath.Join(labFolder, cfg.Name)
			}
			lab, err := vmtest.Up(c.Context(), cfg, dir)
			if err != nil {
				return err
			}
			if on {
				for _, m := range cfg.Machines {
					if err := lab.Power(c.Context(), m.Name, vmtest.On); err != nil {
						return err
					}
				}
			}
			return printLab(c, lab, false)
		},
	}
	c.Flags().BoolVar(&on, "on", false, "switch every machine on")
	return c
}

func labStatusCmd(open func() (*vmtest.Lab, error)) *cobra.Command {
	var format string
	c := &cobra.Command{
		Use:   "status",
		Short: "Show the lab and its machines",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if format != "table" && format != "json" {
				return fmt.Errorf("output format %q: must be table or json", format)
			}
			lab, err := open()
			if err != nil {
				return err
			}
			return printLab(c, lab, format == "json")
		},
	}
	c.Flags().StringVarP(&format, "output", "o", "table", "table or json")
	return c
}

func printLab(c *cobra.Command, lab *vmtest.Lab, asJSON bool) error {
	s, err := lab.Status(c.Context())
	if err != nil {
		return err
	}
	out := c.OutOrStdout()
	if asJSON {
		enc := json.NewEncoder(out)
		enc.SetIndent("", "  ")
		return enc.Encode(s)
	}
	state := "down"
	if s.Running {
		state = "up"
	}
	fmt.Fprintf(out, "lab %s is %s, in %s\n", s.Lab, state, s.Dir)
	fmt.Fprintf(out, "  network     %s, %s, in namespace %s\n", s.Network.Bridge, s.Network.Address, s.NetNS)
	fmt.Fprintf(out, "  accelerator %s: %s\n", s.Accel, s.AccelWhy)
	fmt.Fprintf(out, "  libvirt     virsh -c '%s'\n\n", s.Libvirt)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "MACHINE\tPOWER\tFIRMWARE\tMAC\tCPUS\tMEMORY\tDISKS\tCONSOLE")
	for _, m := range s.Machines {
		var disks []string
		for _, d := range m.Disks {
			disks = append(disks, strings.TrimSpace(humanize.IBytes(uint64(d.Size))+" "+d.Serial))
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%s\t%s\t%s\n", m.Name, m.Power, m.Firmware, m.MAC, m.CPUs, humanize.IBytes(uint64(m.Memory)), strings.Join(disks, ", "), m.Console)
	}
	return w.Flush()
}

func labConsoleCmd(open func() (*vmtest.Lab, error)) *cobra.Command {
	var follow, attach bool
	c := &cobra.Command{
		Use:   "console MACHINE",
		Short: "Print what a machine wrote to its serial console, follow it, or attach to it",
		Args:  cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			lab, err := open()
			if err != nil {
				return err
			}
			if !slices.ContainsFunc(lab.Config().Machines, func(m vmtest.Machine) bool { return m.Name == args[0] }) {
				return fmt.Errorf("lab %s has no machine %q", lab.Config().Name, args[0])
			}
			switch {
			case attach:
				conn, err := lab.Attach(c.Context(), args[0])
				if err != nil {
					return err
				}
				defer conn.Close()
				fmt.Fprintf(c.ErrOrStderr(), "attached to %s, leave with Ctrl-]\n", args[0])
				return converse(c.Context(), conn, c.InOrStdin(), c.OutOrStdout())
			case follow:
				r := lab.Follow(c.Context(), args[0], 0)
				defer r.Close()
				_, err := io.Copy(c.OutOrStdout(), r)
				return err
			}
			f, err := os.Open(lab.Console(args[0]))
			if errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("%s has written nothing yet: is it on? (platter lab power on %s)", args[0], args[0])
			}
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = io.Copy(c.OutOrStdout(), f)
			return err
		},
	}
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what the machine writes, until interrupted")
	c.Flags().BoolVarP(&attach, "attach", "a", false, "type to the machine as well; Ctrl-] leaves")
	c.MarkFlagsMutuallyExclusive("follow", "attach")
	return c
}

const leaveKey = 0x1d // Ctrl-]

// converse joins a console and a terminal until the user leaves, the machine
// loses power or ctx ends.
func converse(ctx context.Context, conn net.Conn, in io.Reader, out io.Writer) error {
	if f, ok := in.(*os.File); ok {
		if saved, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS); err == nil {
			raw := *saved
			// As cfmakeraw(3), but output is left as it is.
			raw.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
			raw.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
			raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 1, 0
			if err := unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, &raw); err != nil {
				return err
			}
			defer unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, saved)
		}
	}
	done := make(chan error, 2)
	go func() {
		_, err := io.Copy(out, conn)
		done <- err
	}()
	go func() {
		buf := make([]byte, 256)
		for {
			n, err := in.Read(buf)
			if i := slices.Index(buf[:n], leaveKey); i >= 0 {
				conn.Write(buf[:i])
				done <- nil
				return
			}
			if _, werr := conn.Write(buf[:n]); werr != nil {
				done <- werr
				return
			}
			if err != nil { // a pipe that has no more to say still listens
				return
			}
		}
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func labInsertCmd(open func() (*vmtest.Lab, error)) *cobra.Command {
	return &cobra.Command{
		Use:   "insert MACHINE FILE.iso",
		Short: "Change the disc in a machine's first CD drive",
		Args:  cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			lab, err := open()
			if err != nil {
				return err
			}
			return lab.Insert(c.Context(), args[0], args[1])
		},
	}
}

func labPowerCmd(open func() (*vmtest.Lab, error)) *cobra.Command {
	actions := []string{string(vmtest.On), string(vmtest.Off), string(vmtest.Cycle), string(vmtest.Reset)}
	return &cobra.Command{
		Use:       "power on|off|cycle|reset MACHINE...|all",
		Short:     "Switch machines; off pulls the plug",
		Args:      cobra.MinimumNArgs(2),
		ValidArgs: actions,
		RunE: func(c *cobra.Command, args []string) error {
			if !slices.Contains(actions, args[0]) {
				return fmt.Errorf("unknown action %q: use %s", args[0], strings.Join(actions, ", "))
			}
			lab, err := open()
			if err != nil {
				return err
			}
			names := args[1:]
			if slices.Equal(names, []string{"all"}) {
				names = nil
				for _, m := range lab.Config().Machines {
					names = append(names, m.Name)
				}
			}
			for _, name := range names {
				if err := lab.Power(c.Context(), name, vmtest.Power(args[0])); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

func labExecCmd(open func() (*vmtest.Lab, error)) *cobra.Command {
	var listen []string
	c := &cobra.Command{
		Use:   "exec [--listen ADDRESS]... -- COMMAND [ARGUMENT]...",
		Short: "Become COMMAND in the lab's network, as the disc host",
		Long: `Exec becomes COMMAND (no process stays in between) in the lab's network
namespace. For each --listen it first listens on that TCP address outside the
lab, port 0 for a free one, prints the address on standard error and passes the
socket on as systemd does (LISTEN_FDS), so that a server in the lab can be
reached from outside.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			lab, err := open()
			if err != nil {
				return err
			}
			return lab.Exec(c.Context(), args, listen, func(a net.Addr) {
				fmt.Fprintf(c.ErrOrStderr(), "listening on %s for %s\n", a, args[0])
			})
		},
	}
	c.Flags().StringArrayVar(&listen, "listen", nil, "TCP address outside the lab to pass to COMMAND as a listening socket")
	return c
}

func labDownCmd(state *string) *cobra.Command {
	var purge bool
	c := &cobra.Command{
		Use:   "down",
		Short: "End the lab: every process in its network, its machines and their disks; consoles stay",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			dir, err := onlyLab(*state)
			if err != nil {
				return err
			}
			if err := vmtest.Down(c.Context(), dir, purge); err != nil {
				return err
			}
			fmt.Fprintf(c.OutOrStdout(), "the lab in %s is down\n", dir)
			return nil
		},
	}
	c.Flags().BoolVar(&purge, "purge", false, "remove the consoles and the state folder, too")
	return c
}
