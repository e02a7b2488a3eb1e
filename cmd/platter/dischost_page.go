package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	_ "embed"
	"errors"
	"fmt"
	"html/template"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"platter/provision/dischost"
	"platter/provision/rack"
)

const (
	// chooserPort is the page's.
	chooserPort = 8443
	// chooserTries is how often a code may be wrong before the page closes.
	chooserTries = 10
	// uploadLimit is in bytes, of a rack file with all that it refers to.
	uploadLimit = 1 << 20
)

//go:embed dischost_page.html
var chooserPage string

//go:embed dischost_page.css
var chooserStyle string

var chooserTemplate = template.Must(template.New("").Parse(chooserPage))

// chooser is the page on which a disc host that was just booted is told what to
// serve. It is there until somebody has chosen, on the page or elsewhere. Nobody
// gets in without the code that the console shows.
type chooser struct {
	code    string // eight digits
	session string // of browsers that have given the code
	print   string // SHA-256 of the certificate, in hexadecimal
	urls    []string
	undo    []func()

	look    func(context.Context) (machine, error)
	uploads string             // where rack files go that come over the page
	entered chan struct{}      // is closed when somebody has given the code
	chosen  chan chosenMachine // gets one

	mu    sync.Mutex
	m     machine
	tries int  // wrong codes
	in    bool // entered is closed
	done  bool // chosen has one
}

type chosenMachine struct {
	m machine
	c choice
}

// newChooser is the page without its addresses.
func newChooser(m machine, look func(context.Context) (machine, error), uploads string) (*chooser, error) {
	n, err := rand.Int(rand.Reader, big.NewInt(1e8))
	if err != nil {
		return nil, err
	}
	return &chooser{
		code: fmt.Sprintf("%08d", n), session: rand.Text(), look: look, uploads: uploads, m: m,
		entered: make(chan struct{}), chosen: make(chan chosenMachine, 1),
	}, nil
}

// openChooser serves the page on every interface that has a link, at an address
// of 169.254.0.0/16 (RFC 3927), which is where computers are that get no
// address from anybody.
func openChooser(ctx context.Context, m machine, look func(context.Context) (machine, error)) (_ *chooser, err error) {
	p, err := newChooser(m, look, uploadFolder)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	var addrs []netip.Addr
	var listeners []net.Listener
	for _, n := range m.nics {
		if !n.carrier {
			continue
		}
		addr, err := linkLocal(n.mac)
		if err != nil {
			return nil, err
		}
		link, err := netlink.LinkByName(n.name)
		if err != nil {
			return nil, fmt.Errorf("interface %s: %w", n.name, err)
		}
		on := &netlink.Addr{IPNet: &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(16, 32)}, Scope: unix.RT_SCOPE_LINK}
		if err := netlink.AddrReplace(link, on); err != nil {
			return nil, fmt.Errorf("interface %s cannot be given the address %s: %w", n.name, addr, err)
		}
		p.undo = append(p.undo, func() { netlink.AddrDel(link, on) })
		// Several interfaces have the same subnet: answers leave where the question came in.
		lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
			cerr := c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), n.name) })
			return errors.Join(cerr, err)
		}}
		l, err := lc.Listen(ctx, "tcp4", netip.AddrPortFrom(addr, chooserPort).String())
		if err != nil {
			return nil, fmt.Errorf("interface %s: %w", n.name, err)
		}
		p.undo = append(p.undo, func() { l.Close() })
		addrs, listeners = append(addrs, addr), append(listeners, l)
		p.urls = append(p.urls, fmt.Sprintf("https://%s/ (%s)", l.Addr(), n.name))
	}
	if len(listeners) == 0 {
		return nil, errors.New("no interface has a link")
	}
	cert, err := p.certify(addrs)
	if err != nil {
		return nil, err
	}
	srv := &http.Server{
		Handler: p.handler(), TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}},
		ReadTimeout: time.Minute, ErrorLog: log.New(io.Discard, "", 0),
	}
	p.undo = append(p.undo, func() {
		// The last page is still on its way to whoever chose.
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if srv.Shutdown(ctx) != nil {
			srv.Close()
		}
	})
	for _, l := range listeners {
		go srv.ServeTLS(l, "", "")
	}
	return p, nil
}

// linkLocal is the address of RFC 3927 that goes with a MAC: machines that boot
// the same disc differ.
func linkLocal(mac string) (netip.Addr, error) {
	hw, err := net.ParseMAC(mac)
	if err != nil {
		return netip.Addr{}, err
	}
	n := len(hw)
	return netip.AddrFrom4([4]byte{169, 254, 1 + hw[n-2]%254, hw[n-1]}), nil // the first and the last 256 are reserved
}

// certify makes the page's certificate. No clock is asked: that of a machine
// that was just unpacked may be anything.
func (p *chooser) certify(addrs []netip.Addr) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		return tls.Certificate{}, err
	}
	t := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "Platter disc host"},
		NotBefore: time.Unix(0, 0), NotAfter: time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC),
		BasicConstraintsValid: true, IsCA: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, a := range addrs {
		t.IPAddresses = append(t.IPAddresses, a.AsSlice())
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, err
	}
	p.print = fmt.Sprintf("%X", sha256.Sum256(der))
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// overtake closes the choice for the page, unless somebody has chosen on it.
func (p *chooser) overtake() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	free := !p.done
	p.done = true
	return free
}

// close ends the page and takes its addresses away.
func (p *chooser) close() {
	for _, f := range slices.Backward(p.undo) {
		f()
	}
	p.undo = nil
}

// show says on the console how to get to the page.
func (p *chooser) show(w io.Writer) {
	if len(p.urls) == 0 {
		return
	}
	fmt.Fprintf(w, `Or choose on the page, from a computer on the same wire that asks for its address
automatically (DHCP) and waits a minute for none:
  %s
  code %s %s
The browser does not know its certificate, whose SHA-256 is
  %s
  %s
`, strings.Join(p.urls, "\n  "), p.code[:4], p.code[4:], p.print[:32], p.print[32:])
}

// view is what the page shows.
type view struct {
	Code, Done, Closed bool // ask for the code; somebody has chosen; too many wrong codes
	Problem            string
	Page               string // of the rack, once it is served

	Notes    []string
	Racks    []viewOption
	Rack     string // the chosen one's path; empty: choose one
	Networks []viewNetwork
	Places   []viewOption
}

type viewOption struct {
	Value, Text string
	Preset      bool
}

type viewNetwork struct {
	Title string
	Nics  []viewOption
}

// handler answers browsers. Every change needs the session of one that has given
// the code, and comes from the page itself.
func (p *chooser) handler() http.Handler {
	mux := http.NewServeMux()
	page := func(pattern string, f func(r *http.Request, v *view) (status int)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			// What somebody sends slowly keeps nobody else waiting.
			parsed := r.ParseForm()
			if p.known(r) && r.MultipartForm == nil && strings.HasPrefix(r.Header.Get("Content-Type"), "multipart/") {
				parsed = r.ParseMultipartForm(uploadLimit)
			}
			p.mu.Lock()
			defer p.mu.Unlock()
			h := w.Header()
			h.Set("Content-Security-Policy", "default-src 'none'; style-src 'self'; img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'")
			h.Set("Cache-Control", "no-store")
			h.Set("Referrer-Policy", "same-origin")
			h.Set("X-Content-Type-Options", "nosniff")
			v := view{Done: p.done}
			status := http.StatusOK
			switch {
			case p.done:
			case p.known(r) && parsed != nil:
				v.Problem, status = fmt.Sprintf("What was sent did not arrive: %v. Files may have 1 MiB together.", parsed), http.StatusBadRequest
			case p.known(r):
				status = f(r, &v)
			case p.tries >= chooserTries:
				v.Closed, status = true, http.StatusForbidden
			default:
				v.Code = true
				if r.Method == http.MethodPost {
					status = p.enter(w, r, &v)
				}
			}
			if status == http.StatusSeeOther {
				http.Redirect(w, r, "/", status)
				return
			}
			if v.Racks == nil && !v.Code && !v.Done && !v.Closed {
				p.fill(&v, r.FormValue("rack"))
			}
			h.Set("Content-Type", "text/html; charset=utf-8")
			w.WriteHeader(status)
			chooserTemplate.Execute(w, v)
		})
	}
	page("GET /{$}", func(*http.Request, *view) int { return http.StatusOK })
	page("POST /code", func(*http.Request, *view) int { return http.StatusSeeOther }) // it was given before
	page("POST /look", func(r *http.Request, v *view) int {
		m, err := p.look(r.Context())
		if err != nil {
			v.Problem = err.Error()
			return http.StatusInternalServerError
		}
		p.m = m
		return http.StatusSeeOther
	})
	page("POST /upload", p.upload)
	page("POST /serve", p.serve)
	mux.Handle("GET /page.css", dischost.Page()) // the look of the page to come
	mux.HandleFunc("GET /choose.css", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/css; charset=utf-8")
		io.WriteString(w, chooserStyle)
	})
	return http.NewCrossOriginProtection().Handler(http.MaxBytesHandler(mux, uploadLimit))
}

const chooserCookie = "__Host-platter"

func (p *chooser) known(r *http.Request) bool {
	c, err := r.Cookie(chooserCookie)
	return err == nil && subtle.ConstantTimeCompare([]byte(c.Value), []byte(p.session)) == 1
}

// enter lets a browser in that brings the code.
func (p *chooser) enter(w http.ResponseWriter, r *http.Request, v *view) int {
	given := strings.Join(strings.FieldsFunc(r.PostFormValue("code"), func(c rune) bool { return c < '0' || c > '9' }), "")
	if subtle.ConstantTimeCompare([]byte(given), []byte(p.code)) != 1 {
		p.tries++
		v.Problem = fmt.Sprintf("This is not the code that the console of the disc host shows. %d more tries.", chooserTries-p.tries)
		if v.Closed = p.tries >= chooserTries; v.Closed {
			v.Code, v.Problem = false, ""
		}
		return http.StatusForbidden
	}
	http.SetCookie(w, &http.Cookie{Name: chooserCookie, Value: p.session, Path: "/", Secure: true, HttpOnly: true, SameSite: http.SameSiteStrictMode})
	if !p.in {
		p.in = true
		close(p.entered)
	}
	return http.StatusSeeOther
}

// fill shows what can be chosen, and more of it for the rack file at path.
func (p *chooser) fill(v *view, path string) {
	v.Notes = p.m.notes
	preset, _ := p.m.propose()
	chosen := slices.IndexFunc(p.m.racks, func(r rackFile) bool { return r.path == path })
	for i, r := range p.m.racks {
		v.Racks = append(v.Racks, viewOption{r.path, r.String(), i == chosen || chosen < 0 && i == max(preset.rack, 0)})
	}
	if chosen < 0 {
		return
	}
	v.Rack = path
	r := p.m.racks[chosen]
	wires, _ := p.m.wires(r.rack, true)
	for i, nw := range r.rack.Networks {
		n := viewNetwork{Title: fmt.Sprintf("%s (%s in the rack file)", nw.Subnet, nw.Interface)}
		for _, nic := range p.m.nics {
			n.Nics = append(n.Nics, viewOption{nic.name, nic.String(), nic.name == wires[i]})
		}
		v.Networks = append(v.Networks, n)
	}
	v.Places = []viewOption{{"", inMemory, preset.place < 0}}
	for i, at := range p.m.places {
		v.Places = append(v.Places, viewOption{at.device, fmt.Sprintf("%s, folder %s", at, stateFolder), i == preset.place})
	}
}

// upload takes a rack file and the files that it refers to, in the place of the
// last one that came this way.
func (p *chooser) upload(r *http.Request, v *view) int {
	refuse := func(status int, format string, args ...any) int {
		v.Problem = fmt.Sprintf(format, args...)
		return status
	}
	if r.MultipartForm == nil {
		return refuse(http.StatusBadRequest, "No files came.")
	}
	dir := p.uploads + ".new"
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o700)); err != nil {
		return refuse(http.StatusInternalServerError, "The files cannot be kept: %v", err)
	}
	defer os.RemoveAll(dir)
	var racks []string
	for _, h := range r.MultipartForm.File["file"] {
		name := filepath.Base(h.Filename)
		if strings.HasPrefix(name, ".") || name == "/" {
			return refuse(http.StatusBadRequest, "%q is no name of a file that can be taken.", h.Filename)
		}
		f, err := h.Open()
		if err != nil {
			return refuse(http.StatusBadRequest, "%s did not arrive: %v", name, err)
		}
		text, err := io.ReadAll(f)
		f.Close()
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), text, 0o600)
		}
		if err != nil {
			return refuse(http.StatusInternalServerError, "%s cannot be kept: %v", name, err)
		}
		if strings.HasSuffix(name, ".yaml") {
			racks = append(racks, name)
		}
	}
	loads := 0
	var wrong []string
	for _, name := range racks {
		if _, err := rack.Load(filepath.Join(dir, name)); err != nil {
			wrong = append(wrong, fmt.Sprintf("%s: %v", name, err))
			continue
		}
		loads++
	}
	switch {
	case len(racks) == 0:
		return refuse(http.StatusBadRequest, "None of the files is a rack file: its name ends in .yaml.")
	case loads == 0:
		return refuse(http.StatusBadRequest, "Nothing was taken.\n%s", strings.ReplaceAll(strings.Join(wrong, "\n"), dir+"/", ""))
	}
	if err := errors.Join(os.RemoveAll(p.uploads), os.Rename(dir, p.uploads)); err != nil {
		return refuse(http.StatusInternalServerError, "The files cannot be kept: %v", err)
	}
	m := p.m
	m.racks = slices.DeleteFunc(slices.Clone(m.racks), func(r rackFile) bool { return filepath.Dir(r.path) == p.uploads })
	m.find(p.uploads, -1)
	p.m = m
	return http.StatusSeeOther
}

// serve takes the choice.
func (p *chooser) serve(r *http.Request, v *view) int {
	c := choice{place: -1}
	c.rack = slices.IndexFunc(p.m.racks, func(f rackFile) bool { return f.path == r.PostFormValue("rack") })
	if c.rack < 0 {
		v.Problem = "This rack file is not there any more. Choose again."
		return http.StatusConflict
	}
	networks := p.m.racks[c.rack].rack.Networks
	c.nics = r.PostForm["nic"]
	for i, name := range c.nics {
		if !slices.ContainsFunc(p.m.nics, func(n nic) bool { return n.name == name }) || slices.Contains(c.nics[:i], name) {
			v.Problem = fmt.Sprintf("The interface %q cannot be used, or was chosen twice. Choose one for each network.", name)
			return http.StatusBadRequest
		}
	}
	if len(c.nics) != len(networks) {
		v.Problem = "Choose an interface for each network."
		return http.StatusBadRequest
	}
	if device := r.PostFormValue("place"); device != "" {
		c.place = slices.IndexFunc(p.m.places, func(at place) bool { return at.device == device })
		if c.place < 0 {
			v.Problem = device + " is not there any more. Choose again."
			return http.StatusConflict
		}
	}
	p.done = true
	p.chosen <- chosenMachine{p.m, c}
	v.Done = true
	if page := p.m.racks[c.rack].rack.Page; page != "" {
		v.Page = "http://" + page + "/"
	}
	return http.StatusOK
}
