package client

import (
	"context"
	"net"
	"net/http"
	"time"
)

// idleLimit ends a connection on which nothing has moved for so long. A slow
// but living transfer never meets it.
const idleLimit = 45 * time.Second

// idleConn is a connection whose deadline moves with every byte.
type idleConn struct {
	net.Conn
	limit time.Duration
}

func (c idleConn) Read(p []byte) (int, error) {
	c.SetDeadline(time.Now().Add(c.limit))
	return c.Conn.Read(p)
}

func (c idleConn) Write(p []byte) (int, error) {
	c.SetDeadline(time.Now().Add(c.limit))
	return c.Conn.Write(p)
}

// transport makes a keep-alive transport whose connections are dialled to
// network and address, or to the URL's own address where network is empty. No
// proxy is ever asked: nothing leaves the rack.
func transport(network, address string, limit time.Duration) *http.Transport {
	d := &net.Dialer{Timeout: 10 * time.Second}
	return &http.Transport{
		DialContext: func(ctx context.Context, n, a string) (net.Conn, error) {
			if network != "" {
				n, a = network, address
			}
			c, err := d.DialContext(ctx, n, a)
			if err != nil {
				return nil, err
			}
			return idleConn{c, limit}, nil
		},
		TLSHandshakeTimeout: 20 * time.Second,
		MaxIdleConnsPerHost: 2,
		IdleConnTimeout:     30 * time.Second,
	}
}
