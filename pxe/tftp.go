package pxe

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/pin/tftp/v3"

	"platter/provision"
)

// listenTFTP opens the socket of one network, on the disc host's address.
func listenTFTP(ctx context.Context, n provision.Network, port int) (*net.UDPConn, error) {
	lc := control(func(fd int) error { setReceiveBuffer(fd, 1<<20); return nil })
	c, err := lc.ListenPacket(ctx, "udp4", netip.AddrPortFrom(n.DiscHost, uint16(port)).String())
	if err != nil {
		return nil, err
	}
	return c.(*net.UDPConn), nil
}

// serveTFTP serves the loaders on one link until ctx ends. Nothing else is
// readable and nothing writable; the block size is negotiated up to what the
// interface carries in one packet.
func (s *Server) serveTFTP(ctx context.Context, l *link) error {
	log := s.Log.With("interface", l.net.Interface)
	srv := tftp.NewServer(func(name string, w io.ReaderFrom) error {
		t, ok := w.(tftp.OutgoingTransfer)
		if !ok {
			return errors.New("TFTP library without OutgoingTransfer")
		}
		peer := t.RemoteAddr()
		b, err := loaderFile(s.loaders, name)
		if err != nil {
			log.Warn("TFTP: refused", "peer", peer.String(), "file", name, "err", err)
			return err
		}
		start := time.Now()
		if _, err := w.ReadFrom(bytes.NewReader(b)); err != nil {
			// Firmware often asks once only for the size and breaks off.
			log.Info("TFTP: broken off", "peer", peer.String(), "file", name, "err", err)
			return err
		}
		log.Info("TFTP: sent", "peer", peer.String(), "file", name, "bytes", len(b), "took", time.Since(start).Round(time.Millisecond))
		return nil
	}, nil)
	srv.SetHook(tftpLog{log})
	srv.SetTimeout(time.Second) // for a packet that got lost
	srv.SetRetries(8)
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		srv.Shutdown()
	})
	err := srv.Serve(l.tftp)
	if ctx.Err() == nil {
		stop()
		return fmt.Errorf("TFTP on %s stopped: %w", l.net.Interface, errors.Join(err, net.ErrClosed))
	}
	select {
	case <-done:
	case <-time.After(graceTime): // a machine that is gone would keep us for its retries
	}
	return nil
}

// loaderFile finds the loader a client names. Firmware may put a slash in
// front; everything else has to match exactly.
func loaderFile(l loaders, name string) ([]byte, error) {
	if strings.Contains(name, "..") {
		return nil, fmt.Errorf("a path with '..' is not served: %w", fs.ErrPermission)
	}
	b, ok := l.files[strings.TrimPrefix(name, "/")]
	if !ok {
		return nil, fmt.Errorf("no such file: %w", fs.ErrNotExist)
	}
	return b, nil
}

// tftpLog reports what the library refuses on its own.
type tftpLog struct{ log *slog.Logger }

func (tftpLog) OnSuccess(tftp.TransferStats) {}

func (t tftpLog) OnFailure(st tftp.TransferStats, err error) {
	t.log.Debug("TFTP: failed", "peer", st.RemoteAddr, "file", st.Filename, "err", err)
}
