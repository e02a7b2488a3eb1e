package pxe

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"platter/provision"
)

const (
	graceTime = 3 * time.Second // for transfers when the server ends
	// A peer that acknowledges nothing for so long is gone. There is no limit
	// on how long an answer takes: slow nodes are served to the end.
	peerGone = 5 * time.Minute
)

// listenHTTP opens the listener of one network, on the disc host's address.
func listenHTTP(ctx context.Context, n provision.Network, port int, share bool) (net.Listener, error) {
	lc := control(func(fd int) error {
		if share {
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
				return err
			}
		}
		return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(peerGone.Milliseconds()))
	})
	return lc.Listen(ctx, "tcp4", netip.AddrPortFrom(n.DiscHost, uint16(port)).String())
}

// serveHTTP serves one link until ctx ends.
func (s *Server) serveHTTP(ctx context.Context, l *link) error {
	srv := &http.Server{
		Handler:           s.handler(l.net),
		ReadHeaderTimeout: 30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug),
	}
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), graceTime)
		defer cancel()
		if srv.Shutdown(grace) != nil {
			srv.Close() // a node goes on from where it was when we are back
		}
	})
	err := srv.Serve(l.http)
	if ctx.Err() == nil {
		stop()
		return fmt.Errorf("HTTP on %s stopped: %w", l.net.Interface, err)
	}
	<-done
	return nil
}

// handler serves boot scripts, loaders and objects to one network.
func (s *Server) handler(n provision.Network) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w := &recorder{ResponseWriter: rw, status: http.StatusOK}
		start := time.Now()
		level := s.route(n, w, r)
		if w.status >= 400 {
			level = max(level, slog.LevelWarn)
		}
		s.Log.Log(r.Context(), level, "HTTP", "peer", r.RemoteAddr, "method", r.Method, "target", r.RequestURI,
			"status", w.status, "bytes", w.bytes, "took", time.Since(start).Round(time.Millisecond))
	})
}

// route answers and returns how loudly to log it.
func (s *Server) route(n provision.Network, w http.ResponseWriter, r *http.Request) slog.Level {
	refuse := func(status int, why string) slog.Level {
		http.Error(w, why, status)
		return slog.LevelInfo // raised for its status
	}
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	switch {
	case err != nil || !n.Subnet.Contains(peer.Addr().Unmap()):
		return refuse(http.StatusForbidden, "only machines of "+n.Subnet.String()+" are served here")
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		w.Header().Set("Allow", "GET, HEAD")
		return refuse(http.StatusMethodNotAllowed, "only GET and HEAD are served here")
	case !plainPath(r):
		return refuse(http.StatusNotFound, "no such file")
	}
	switch path := r.URL.Path; {
	case path == "/boot.ipxe":
		s.bootScript(n, peer.Addr().Unmap(), w, r)
		return slog.LevelInfo
	case strings.HasPrefix(path, "/objects/") && s.Objects != nil:
		s.Objects.ServeHTTP(w, r)
		return slog.LevelDebug // a node fetches hundreds of ranges
	case strings.HasPrefix(path, "/ipxe/"): // UEFI HTTP boot
		name := strings.TrimPrefix(path, "/ipxe/")
		b, ok := s.loaders.files[name]
		if !ok {
			return refuse(http.StatusNotFound, "no such file")
		}
		w.Header().Set("Content-Type", "application/efi")
		http.ServeContent(w, r, name, time.Time{}, bytes.NewReader(b))
		return slog.LevelInfo
	}
	return refuse(http.StatusNotFound, "no such file")
}

// plainPath tells that a request's path means just what it says: absolute, and
// without anything that cleaning or decoding would change.
func plainPath(r *http.Request) bool {
	raw, _, _ := strings.Cut(r.RequestURI, "?")
	return strings.HasPrefix(raw, "/") && raw == r.URL.Path && !strings.Contains(raw, "..") && !strings.Contains(raw, "//") &&
		!strings.ContainsAny(raw, "%\\\x00")
}

// bootScript answers iPXE. A status other than 200 would end in the firmware's
// menu, so mistakes too are answered with a script.
func (s *Server) bootScript(n provision.Network, peer netip.Addr, w http.ResponseWriter, r *http.Request) {
	var text string
	if r.Method == http.MethodGet { // HEAD must not spend a token
		req, err := bootRequest(n, peer, s.Ports.HTTP, r.URL.Query())
		if err != nil {
			s.Log.Warn("boot request without a usable MAC", "peer", peer, "target", r.RequestURI, "err", err)
			text = req.Explain(fmt.Sprintf("the boot request is not understood: %v", err))
		} else {
			text = s.Backend.BootScript(r.Context(), req)
		}
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	if r.Method == http.MethodGet {
		w.Header().Set("Content-Length", strconv.Itoa(len(text)))
	}
	io.WriteString(w, text) // an error means that the machine is gone; it asks again
}

// bootRequest reads the parameters of a boot request. With an error, the
// request still serves to write a script.
func bootRequest(n provision.Network, peer netip.Addr, port int, q url.Values) (BootRequest, error) {
	req := BootRequest{Addr: peer, DiscHost: n.DiscHost, Platform: "pcbios", Arch: "x86_64"}
	if q.Get("platform") == "efi" {
		req.Platform = "efi"
	}
	switch a := q.Get("arch"); a {
	case "i386", "x86_64", "arm32", "arm64":
		req.Arch = a
	}
	hw, err := net.ParseMAC(q.Get("mac"))
	switch {
	case err != nil || len(hw) != 6:
		return req, fmt.Errorf("%.40q is not a MAC address", q.Get("mac"))
	case hw[0]&1 == 1 || hw.String() == "00:00:00:00:00:00":
		return req, fmt.Errorf("%s is not the address of one machine", hw)
	}
	req.MAC = provision.MAC(hw.String())
	req.Again = ScriptURL(hostPort(n.DiscHost, port, provision.HTTPPort), req.MAC, req.Platform, req.Arch)
	return req, nil
}

// recorder notes status and size for the log. It passes ReadFrom on: without
// that, the kernel could not send files by itself (sendfile), which triples
// the processor time of a transfer.
type recorder struct {
	http.ResponseWriter
	status int
	bytes  int64
}

func (w *recorder) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *recorder) Write(b []byte) (int, error) {
	n, err := w.ResponseWriter.Write(b)
	w.bytes += int64(n)
	return n, err
}

func (w *recorder) ReadFrom(r io.Reader) (int64, error) {
	n, err := io.Copy(w.ResponseWriter, r)
	w.bytes += n
	return n, err
}

func (w *recorder) Unwrap() http.ResponseWriter { return w.ResponseWriter }
